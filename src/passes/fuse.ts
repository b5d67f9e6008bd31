/**
 * Fusion: replaces instructions of a block by one that reads and writes less memory (src/ops/fused.ts). It runs after lowering, for targets
 * whose kernels include the fused ops, so neither the graph nor its sharding depends on the target.
 */
import type { Chunk, Program } from "../../schemas/plan.ts";
import { returnActivationsAgain } from "./fusion/activations.ts";
import { BufferUses } from "./fusion/bufferUses.ts";
import { fuseStatistics } from "./fusion/statistics.ts";
import { fuseSums } from "./fusion/sums.ts";

/** Returns the programs with fused instructions if the target has kernels for them, else the programs themselves. */
export const fuseFor = ({ fuses }: { readonly fuses?: true }, programs: Program[]): Program[] => (fuses ? programs.map(fuse) : programs);

/** Returns a program with fused instructions. Buffers that only passed between fused instructions are gone. */
function fuse(program: Program): Program {
  const uses = new BufferUses(program);
  const fused = (c: Chunk): Chunk =>
    returnActivationsAgain({ ...c, forward: fuseStatistics(c.forward), backward: fuseSums(c.backward, uses) }, uses);
  const chunks = program.chunks.map(fused);
  return { ...program, chunks, buffers: uses.values() };
}
