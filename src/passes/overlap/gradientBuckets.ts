/**
 * Reduction of gradients in buckets, beside backward. A bucket is reduced as soon as backward of the last microbatch has completed its
 * gradients; the step block waits for it where it reads the sums. Each gradient is summed in the order of sums as without buckets.
 */
import { readsOf, touchedBy, writesOf } from "../../../schemas/effects.ts";
import type { Buffer, Chunk, Collective, Compute, Instruction, Program } from "../../../schemas/plan.ts";
import { blockOf, microbatchesIn } from "../../../schemas/program.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { type Bucket, BucketFiller, type Chain, collectivesOf, withWaits } from "./buckets.ts";

/** The reduction of a gradient in the step block. */
interface Reduction extends Chain {
  readonly gradient: string;
  /** The instructions of the step block that the bucket replaces. */
  readonly replaced: readonly Instruction[];
  /** Temporary buffers that the bucket does not need. */
  readonly temporary: readonly string[];
}
/** The instruction of the last microbatch after which a gradient is complete. */
interface Ready {
  /** The number of the block run among those of the last microbatch. */
  readonly run: number;
  readonly block: readonly Instruction[];
  readonly at: number;
}
interface ReadyReduction extends Reduction {
  readonly ready: Ready;
}

/** Returns a program whose gradients are reduced in buckets of at least so many bytes. */
export function bucketGradients(program: Program, bytes: number): Program {
  const buffers = new BufferTable(program.buffers);
  const readyAt = completionOf(program, buffers);
  const reductions = reductionsOf(program, buffers).flatMap((r): ReadyReduction[] => {
    const ready = readyAt.get(r.gradient);
    return ready ? [{ ...r, ready }] : [];
  });
  if (reductions.length === 0) return program;
  const inOrder = reductions.toSorted((a, b) => a.ready.run - b.ready.run || a.ready.at - b.ready.at);
  const filler = new BucketFiller<ReadyReduction>(buffers, bytes);
  const closed = inOrder.flatMap((r) => filler.add(r) ?? []);
  const buckets = [...closed, ...filler.rest()].map((bucket) => ({ ready: lastOf(bucket).ready, collectives: collectivesIn(bucket) }));

  const inserted = new Map<Instruction, Collective[]>();
  for (const { ready, collectives } of buckets) {
    const after = ready.block[ready.at];
    if (after) inserted.set(after, [...(inserted.get(after) ?? []), ...collectives]);
  }
  const insert = (block: readonly Instruction[]): Instruction[] => block.flatMap((i) => [i, ...(inserted.get(i) ?? [])]);
  // counts of tokens, which take the place of a gradient, are complete in forward
  const chunks = program.chunks.map(
    (c): Chunk => ({ ...c, forward: insert(c.forward), backward: insert(c.backward), weights: insert(c.weights) }),
  );
  const replaced = new Set(reductions.flatMap((r) => r.replaced));
  const placed = separate(program.buffers, reductions);
  // in the order in which they begin: a wait for a collective is a wait for those before it
  const begun = buckets.toSorted((a, b) => a.ready.run - b.ready.run || a.ready.at - b.ready.at).flatMap(({ collectives }) => collectives);
  const step = withWaits(
    program.step.filter((i) => !replaced.has(i)),
    begun,
    new BufferTable(placed),
  );
  return { ...program, chunks, step, buffers: placed };
}

const lastOf = ({ chains }: Bucket<ReadyReduction>): ReadyReduction => chains.at(-1) ?? chains[0];
const collectivesIn = (bucket: Bucket<ReadyReduction>): Collective[] =>
  collectivesOf(bucket, {
    ...{ id: lastOf(bucket).gradient, stream: "gradients", path: "parallel.gradient_bucket", only: "last" },
    because: "each rank saw other tokens",
  });

/** Returns where backward of the last microbatch touches each gradient for the last time. */
function completionOf(program: Program, buffers: BufferTable): Map<string, Ready> {
  const last = microbatchesIn(program) - 1;
  const ready = new Map<string, Ready>();
  for (const [run, block] of program.order
    .filter((r) => r.microbatch === last)
    .map((r) => blockOf(program, r))
    .entries())
    for (const [at, i] of block.entries())
      for (const id of touchedBy(i, buffers)) if (buffers.get(id).kind === "gradient") ready.set(id, { run, block, at });
  return ready;
}

/**
 * Returns the reductions of gradients that can run beside backward: collectives on the gradient itself, one after another. A gradient that
 * the step block first brings into another order stays there: the copy would need memory of its own until the end of backward.
 */
function reductionsOf({ step, parameters }: Program, buffers: BufferTable): Reduction[] {
  const maker = new Map<string, Instruction>();
  const readers = new Map<string, number>();
  for (const i of step) {
    for (const id of writesOf(i, buffers)) if (!maker.has(id)) maker.set(id, i);
    for (const id of readsOf(i)) readers.set(id, (readers.get(id) ?? 0) + 1);
  }
  return [...new Set(parameters.map(({ gradient }) => gradient))].flatMap((reduced): Reduction[] => {
    const links: Collective[] = [];
    const replaced: Instruction[] = [];
    const temporary: string[] = [];
    let current = reduced;
    for (let by = maker.get(current); by; by = maker.get(current)) {
      let to = current;
      if (isCopy(by)) {
        const { x = "" } = by.reads;
        const source = maker.get(x);
        if (source?.kind !== "collective" || source.world || readers.get(x) !== 1) return [];
        replaced.push(by);
        temporary.push(x);
        by = source;
        to = current;
      }
      if (by.kind !== "collective" || by.world) return [];
      replaced.push(by);
      links.unshift({ ...by, to });
      current = by.from;
      if (buffers.get(current).kind !== "gradient") return [];
    }
    return links.length > 0 ? [{ gradient: current, links, replaced, temporary, bytes: buffers.bytesOf(current) }] : [];
  });
}
/** Returns whether an instruction copies the result of a reduction into the bytes of the gradient. */
const isCopy = (i: Instruction): i is Compute => i.kind === "compute" && i.op === "arrange";

/**
 * Returns the buffers without temporary ones. A result that is smaller than its source gets memory of its own, because other ranks read the
 * source until the reduction has ended; the result of an all-reduce stays in the bytes of its source.
 */
function separate(buffers: readonly Buffer[], reductions: readonly Reduction[]): Buffer[] {
  const temporary = new Set(reductions.flatMap((r) => r.temporary));
  const inPlace = new Map<string, string>();
  const apart = new Set<string>();
  for (const { how, from, to } of reductions.flatMap(({ links }) => links))
    if (how === "all_reduce" || how === "all_reduce_max") inPlace.set(to, from);
    else apart.add(to);
  return buffers.flatMap((b): Buffer[] => {
    if (temporary.has(b.id)) return [];
    const { within: _, ...own } = b;
    const source = inPlace.get(b.id);
    return [apart.has(b.id) ? own : source === undefined ? b : { ...b, within: source }];
  });
}
