/** The block of a pair: the timed instructions of a forward and of a backward in the turns that the plan states. */
import type { BlockRun, Program } from "../../../schemas/plan.ts";
import { turnsOf } from "../../../schemas/program.ts";
import type { BlockRunTimes } from "./blockRun.ts";
import { inOtherCopy, type TimedBlock, type TimedInstruction } from "./timedBlocks.ts";

/** Returns the block of two block runs that run together. Their activations are in different copies. */
export function pairedBlock(
  program: Pick<Program, "chunks" | "pairs">,
  group: readonly BlockRun[],
  blocks: readonly TimedBlock[],
): TimedBlock {
  const [first, second] = blocks;
  if (!first || !second) throw new Error("rankc: a pair has two blocks");
  const byId = new Map<string, TimedInstruction>([
    ...first.instructions.map((i) => [i.instruction.id, i] as const),
    ...second.instructions.map((i) => [i.instruction.id, inOtherCopy(i)] as const),
  ]);
  // instructions of the first or of the last microbatch alone are in the blocks of these only
  const instructions = turnsOf(program, group).flatMap((turn) => turn.instructions.flatMap(({ id }) => byId.get(id) ?? []));
  return { ...first, instructions, launches: first.launches + second.launches };
}

/** One of the blocks that ran together: its share of the kernels' time, and the times of its instructions. */
export interface MemberTimes {
  readonly share: number;
  readonly times: Float64Array;
}

/** Returns the times of the blocks of which a block consists, in order. */
export function memberTimesOf(block: TimedBlock, blocks: readonly TimedBlock[], { times }: BlockRunTimes): MemberTimes[] {
  if (blocks.length === 1) return [{ share: 1, times }];
  const placeOf = new Map(block.instructions.map(({ instruction }, at) => [instruction.id, at]));
  const kernels = blocks.map(({ instructions }) =>
    instructions.reduce((sum, { instruction, seconds }) => sum + (instruction.kind === "compute" ? seconds : 0), 0),
  );
  const all = kernels.reduce((sum, seconds) => sum + seconds, 0);
  return blocks.map(({ instructions }, n) => ({
    share: all > 0 ? (kernels[n] ?? 0) / all : 1 / blocks.length,
    times: Float64Array.from(
      instructions.flatMap(({ instruction }) => {
        const at = placeOf.get(instruction.id) ?? 0;
        return [times[2 * at] ?? 0, times[2 * at + 1] ?? 0];
      }),
    ),
  }));
}
