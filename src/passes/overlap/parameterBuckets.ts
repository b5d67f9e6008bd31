/**
 * Gathering of updated parameters in buckets. With the distributed optimizer each rank updates a shard of a parameter and gathers the
 * others: beside the updates of the parameters after them, or ahead of their first use in the next forward.
 */
import type { Collective, Instruction, Program } from "../../../schemas/plan.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { type Bucket, BucketFiller, type Chain, collectivesOf, withWaits } from "./buckets.ts";

interface Gather extends Chain {
  readonly parameter: string;
}

/** Returns a program whose step block gathers parameters in buckets of at least so many bytes. */
export function bucketParameters(program: Program, bytes: number): Program {
  const buffers = new BufferTable(program.buffers);
  const own = new Set(program.parameters.map(({ buffer }) => buffer));
  const filler = new BucketFiller<Gather>(buffers, bytes);
  const step: Instruction[] = [];
  /** The last collective of each bucket so far. */
  const begun: Collective[] = [];
  const begin = (bucket: Bucket<Gather>): void => {
    const { parameter } = bucket.chains.at(-1) ?? bucket.chains[0];
    const because = "each rank updated its shard";
    const [collective] = collectivesOf(bucket, { id: parameter, stream: "parameters", path: "parallel.parameter_bucket", because });
    if (!collective) return;
    // the shards of a bucket are in workspace: those of more than two buckets would not be free for the updates that follow
    const before = begun.at(-2);
    step.push(before ? { ...collective, waits: [before.id] } : collective);
    begun.push(collective);
  };
  let gathered = 0;
  for (const i of program.step) {
    if (i.kind !== "collective" || i.how !== "all_gather" || i.world || !own.has(i.to)) {
      step.push(i);
      continue;
    }
    const closed = filler.add({ links: [i], bytes: buffers.bytesOf(i.to), parameter: i.to });
    if (closed) begin(closed);
    gathered = step.length;
  }
  if (gathered === 0) return program;
  // what follows the last gather may read a parameter, as the transfer of a tied embedding does
  const after = step.splice(gathered);
  for (const bucket of filler.rest()) begin(bucket);
  return { ...program, step: withWaits([...step, ...after], [], buffers) };
}
