/**
 * Fusion: replaces instructions of a block by one that reads and writes less memory (src/ops/fused.ts). It runs after lowering, for targets
 * whose kernels include the fused ops, so neither the graph nor its sharding depends on the target.
 */
import type { Chunk, Program } from "../../schemas/plan.ts";
import type { Fusion } from "../codegen/targetNames.ts";
import { returnActivationsAgain } from "./fusion/activations.ts";
import { BufferUses } from "./fusion/bufferUses.ts";
import { fuseCombine } from "./fusion/combine.ts";
import { fuseEpilogues } from "./fusion/epilogues.ts";
import { fuseHeads } from "./fusion/heads.ts";
import { fuseNormSums, fuseSlopeSums } from "./fusion/norms.ts";
import { fuseStatistics } from "./fusion/statistics.ts";
import { fuseSums } from "./fusion/sums.ts";
import { joinTensors } from "./fusion/tensorLists.ts";
import { fuseTwins } from "./fusion/twins.ts";

/** Returns the programs with fused instructions if the target has kernels for them, else the programs themselves. */
export const fuseFor = ({ fuses = [] }: { readonly fuses?: readonly Fusion[] }, programs: Program[]): Program[] =>
  fuses.length > 0 ? programs.map((p) => fuse(p, new Set(fuses))) : programs;

/**
 * Returns the programs whose step blocks run one instruction for several tensors, if the target has kernels for them. It runs after overlap, which
 * moves collectives in between: only instructions that follow one another are joined, so no collective begins or ends at another place.
 */
export const joinFor = ({ fuses = [] }: { readonly fuses?: readonly Fusion[] }, programs: Program[]): Program[] =>
  fuses.includes("tensor_lists") ? programs.map((p) => ({ ...p, step: joinTensors(p.step, p) })) : programs;

/** Returns a program with fused instructions. Buffers that only passed between fused instructions are gone. */
function fuse(program: Program, kinds: ReadonlySet<Fusion>): Program {
  const uses = new BufferUses(program);
  function fused(c: Chunk): Chunk {
    let { forward, backward } = c;
    if (kinds.has("heads")) [forward, backward] = [fuseHeads(forward, uses), fuseHeads(backward, uses)];
    if (kinds.has("statistics")) forward = fuseStatistics(forward);
    // before norms add what they read: the sum of a token's rows saves more
    if (kinds.has("combine")) [forward, backward] = [fuseCombine(forward, uses), fuseCombine(backward, uses)];
    if (kinds.has("norm_sums")) forward = fuseNormSums(forward, uses);
    if (kinds.has("sums")) backward = fuseSums(backward, uses);
    if (kinds.has("norm_sums")) backward = fuseSlopeSums(backward, uses);
    let chunk: Chunk = { ...c, forward, backward };
    if (kinds.has("activations")) chunk = returnActivationsAgain(chunk, uses);
    if (kinds.has("epilogues"))
      chunk = { ...chunk, forward: fuseEpilogues(chunk.forward, uses), backward: fuseEpilogues(chunk.backward, uses) };
    if (kinds.has("twins"))
      chunk = {
        ...chunk,
        ...{ forward: fuseTwins(chunk.forward, uses), backward: fuseTwins(chunk.backward, uses), weights: fuseTwins(chunk.weights, uses) },
      };
    return chunk;
  }
  const chunks = program.chunks.map(fused);
  return { ...program, chunks, buffers: uses.values() };
}
