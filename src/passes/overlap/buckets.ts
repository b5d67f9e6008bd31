/** Buckets: tensors that one asynchronous collective exchanges, and the instructions that wait for it. */
import { touchedBy } from "../../../schemas/effects.ts";
import type { Collective, Instruction, StreamName } from "../../../schemas/plan.ts";
import { endedBy } from "../../analysis/asyncTouches.ts";
import type { BufferTable } from "../../analysis/bufferTable.ts";

/** The collectives of one tensor, one after another, with its bytes before the first. */
export interface Chain {
  readonly links: readonly Collective[];
  readonly bytes: number;
}
/** Tensors whose chains have the same collectives over the same groups in the same type, in the order in which they are ready. */
export interface Bucket<C extends Chain = Chain> {
  readonly chains: readonly [C, ...C[]];
}

/** Fills buckets in the order in which tensors are ready. Each closes with the tensor that brings it to `bytes`. */
export class BucketFiller<C extends Chain> {
  readonly #buffers: BufferTable;
  readonly #bytes: number;
  readonly #open = new Map<string, [C, ...C[]]>();

  constructor(buffers: BufferTable, bytes: number) {
    this.#buffers = buffers;
    this.#bytes = bytes;
  }

  /** Adds a tensor. Returns the bucket that it closes. */
  add(chain: C): Bucket<C> | undefined {
    const key = chain.links
      .map(({ how, subAxes, from }) => `${how} ${subAxes.toSorted((a, b) => a - b)} ${this.#buffers.get(from).dtype}`)
      .join("; ");
    const chains = this.#open.get(key);
    const filled: [C, ...C[]] = chains ? [...chains, chain] : [chain];
    this.#open.set(key, filled);
    if (filled.reduce((sum, { bytes }) => sum + bytes, 0) < this.#bytes) return undefined;
    this.#open.delete(key);
    return { chains: filled };
  }

  /** Returns the buckets that are not full, in the order of their last tensors' chains. */
  rest(): Bucket<C>[] {
    return [...this.#open.values()].map((chains) => ({ chains }));
  }
}

/** How the collectives of a bucket are named, and where they run. */
interface Naming {
  readonly id: string;
  readonly stream: StreamName;
  readonly path: string;
  readonly because: string;
  readonly only?: "last";
}

/** Returns the collectives of a bucket: one for each link of its chains. */
export function collectivesOf({ chains }: Bucket, { id, stream, path, because, only }: Naming): Collective[] {
  const [{ links }] = chains;
  return links.map((link, at) => {
    const pairs = chains.flatMap((c) => {
      const own = c.links[at];
      return own ? [own] : [];
    });
    const [first = link, ...others] = pairs;
    return {
      ...link,
      ...{ id: `${id}.bucket.${link.how}`, stream, from: first.from, to: first.to },
      ...(only && { only }),
      ...(others.length > 0 && { more: others.map(({ from, to }) => ({ from, to })) }),
      bytes: pairs.reduce((sum, { bytes }) => sum + bytes, 0),
      why: { op: link.why.op, because, path },
    };
  });
}

/**
 * Returns a block in which the first instruction that touches a buffer of an asynchronous collective waits for it. `open` are the
 * collectives that have begun before the block; those that begin in the block are added to it.
 */
export function withWaits(block: readonly Instruction[], open: readonly Collective[], buffers: BufferTable): Instruction[] {
  const rootsOf = (i: Instruction): Map<string, string[]> => {
    const ids = new Map<string, string[]>();
    for (const id of touchedBy(i, buffers)) ids.set(buffers.rootOf(id), [...(ids.get(buffers.rootOf(id)) ?? []), id]);
    return ids;
  };
  const areApart = (a: ReadonlyMap<string, readonly string[]>, b: ReadonlyMap<string, readonly string[]>): boolean =>
    [...a].every(([root, ids]) => ids.every((id) => !b.get(root)?.some((other) => buffers.overlap(id, other))));
  const begun = new Map<string, Collective>();
  const wait = (id: string): void => void endedBy(begun, id);
  for (const i of open) begun.set(i.id, i);
  return block.map((i) => {
    const stream = i.kind === "collective" ? i.stream : undefined;
    for (const id of i.waits ?? []) wait(id);
    const touched = rootsOf(i);
    const waits = new Set(i.waits);
    // from the last to the first: a wait for a collective is a wait for those before it on its stream
    for (const by of [...begun.values()].toReversed()) {
      if (!begun.has(by.id) || by.stream === stream || areApart(rootsOf(by), touched)) continue;
      waits.add(by.id);
      wait(by.id);
    }
    if (i.kind === "collective" && i.stream) begun.set(i.id, i);
    return waits.size > 0 ? { ...i, waits: [...waits] } : i;
  });
}
