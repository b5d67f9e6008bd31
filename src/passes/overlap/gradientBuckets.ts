/**
 * Reduction of gradients in buckets, beside backward. A bucket is reduced as soon as backward of the last microbatch has completed its
 * gradients; the step block waits for it where it reads the sums. Each gradient is summed in the order of sums as without buckets.
 *
 * Gradients that are sent in another type or order are copied into workspace just before their bucket begins. Workspace ends with its
 * block, so such buckets end within it: each waits for the one before the last, and the last of a block runs in order.
 */
import { readsOf, touchedBy, writesOf } from "../../../schemas/effects.ts";
import type { Chunk, Collective, Compute, Instruction, Program } from "../../../schemas/plan.ts";
import { blockOf, microbatchesIn } from "../../../schemas/program.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { type Bucket, BucketFiller, type Chain, collectivesOf, withWaits } from "./buckets.ts";

/** The reduction of a gradient in the step block. */
interface Reduction extends Chain {
  readonly gradient: string;
  /** The copies of the gradient into the type and the order in which it is sent, in workspace. */
  readonly copies: readonly Compute[];
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
/** A bucket as instructions. */
interface Begun {
  readonly ready: Ready;
  readonly copies: readonly Compute[];
  readonly collectives: readonly Collective[];
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
  const buckets = withinBlocks(
    [reductions.filter(({ copies }) => copies.length === 0), reductions.filter(({ copies }) => copies.length > 0)]
      .flatMap((some) => fill(some, buffers, bytes))
      .sort((a, b) => a.ready.run - b.ready.run || a.ready.at - b.ready.at),
  );
  const inserted = new Map<Instruction, Instruction[]>();
  for (const { ready, copies, collectives } of buckets) {
    const after = ready.block[ready.at];
    if (after) inserted.set(after, [...(inserted.get(after) ?? []), ...copies, ...collectives]);
  }
  const insert = (block: readonly Instruction[]): Instruction[] => block.flatMap((i) => [i, ...(inserted.get(i) ?? [])]);
  // counts of tokens, which take the place of a gradient, are complete in forward
  const chunks = program.chunks.map(
    (c): Chunk => ({ ...c, forward: insert(c.forward), backward: insert(c.backward), weights: insert(c.weights) }),
  );
  const replaced = new Set(reductions.flatMap((r) => r.replaced));
  // a bucket writes each sum into the bytes of its gradient itself
  const temporary = new Set(reductions.flatMap((r) => r.temporary));
  const placed = program.buffers.filter(({ id }) => !temporary.has(id));
  // in the order in which they begin: a wait for a collective is a wait for those before it
  const open = buckets.flatMap(({ copies, collectives }) => (copies.length > 0 ? [] : collectives));
  const step = withWaits(
    program.step.filter((i) => !replaced.has(i)),
    open,
    new BufferTable(placed),
  );
  return { ...program, chunks, step, buffers: placed };
}

/** Returns the buckets of reductions. */
function fill(reductions: readonly ReadyReduction[], buffers: BufferTable, bytes: number): Begun[] {
  const inOrder = reductions.toSorted((a, b) => a.ready.run - b.ready.run || a.ready.at - b.ready.at);
  const filler = new BucketFiller<ReadyReduction>(buffers, bytes);
  const closed = inOrder.flatMap((r) => filler.add(r) ?? []);
  return [...closed, ...filler.rest()].map(
    (bucket): Begun => ({
      ready: lastOf(bucket).ready,
      copies: bucket.chains.flatMap(({ copies }) => copies.map((i): Compute => ({ ...i, only: "last" }))),
      collectives: collectivesOf(bucket, {
        ...{ id: lastOf(bucket).gradient, stream: "gradients", path: "parallel.gradient_bucket", only: "last" },
        because: "each rank saw other tokens",
      }),
    }),
  );
}
const lastOf = ({ chains }: Bucket<ReadyReduction>): ReadyReduction => chains.at(-1) ?? chains[0];

/** Returns buckets, in the order of their begin, of which those with copies wait for one another and end within their block. */
function withinBlocks(buckets: readonly Begun[]): Begun[] {
  const copying = buckets.filter(({ copies }) => copies.length > 0);
  return buckets.map((bucket) => {
    const at = copying.indexOf(bucket);
    if (at < 0) return bucket;
    const isBeside = (other: Begun | undefined): other is Begun => other?.ready.block === bucket.ready.block;
    const [before, last, next] = [copying[at - 2], copying[at - 1], copying[at + 1]].map((b) => (isBeside(b) ? b : undefined));
    const isLast = next === undefined;
    const awaited = (isLast ? last : before)?.collectives.at(-1);
    const waiting = <I extends Instruction>(i: I, n: number): I => (n === 0 && awaited ? { ...i, waits: [awaited.id] } : i);
    if (!isLast) return { ...bucket, copies: bucket.copies.map(waiting) };
    return { ...bucket, collectives: bucket.collectives.map(({ stream: _, ...i }, n) => waiting(i, n)) };
  });
}

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

/** Returns the reductions of gradients: copies of the gradient into workspace, if there are any, then collectives one after another. */
function reductionsOf({ step, parameters }: Program, buffers: BufferTable): Reduction[] {
  const maker = new Map<string, Instruction>();
  const readers = new Map<string, number>();
  for (const i of step) {
    for (const id of writesOf(i, buffers)) if (!maker.has(id)) maker.set(id, i);
    for (const id of readsOf(i)) readers.set(id, (readers.get(id) ?? 0) + 1);
  }
  return [...new Set(parameters.map(({ gradient }) => gradient))].flatMap((reduced): Reduction[] => {
    const links: Collective[] = [];
    const copies: Compute[] = [];
    const replaced: Instruction[] = [];
    const temporary: string[] = [];
    let current = reduced;
    for (let by = maker.get(current); by; by = maker.get(current)) {
      let to = current;
      if (isCopy(by) && buffers.get(current).kind === "gradient") {
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
      for (let copy = maker.get(current); buffers.get(current).kind === "workspace"; copy = maker.get(current)) {
        if (!copy || !isCopy(copy) || readers.get(current) !== 1) return [];
        replaced.push(copy);
        copies.unshift(copy);
        current = copy.reads.x ?? "";
      }
      if (copies.length > 0) break;
    }
    const isWhole = links.length > 0 && buffers.get(current).kind === "gradient" && buffers.get(current).within === undefined;
    return isWhole ? [{ gradient: current, links, copies, replaced, temporary, bytes: sentBytes(links, buffers) }] : [];
  });
}
/** Returns the bytes of a gradient as it is sent. */
const sentBytes = ([first]: readonly Collective[], buffers: BufferTable): number => (first ? buffers.bytesOf(first.from) : 0);
/** Returns whether an instruction copies a gradient: into another type or order, or a result into the bytes of the gradient. */
const isCopy = (i: Instruction): i is Compute => i.kind === "compute" && (i.op === "arrange" || i.op === "cast");
