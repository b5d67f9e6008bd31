/**
 * Lowering of reshard steps to raw collectives. After this pass a reshard step is one collective on contiguous buffers
 * (runtime/backend.ts, `Comm`), with ops before and after it that arrange blocks.
 *
 * The parts: collectives/memoryAxes.ts describes a sharded value by its axes in memory, blockExchange.ts exchanges dense blocks,
 * rowExchange.ts lists of ragged rows, emitter.ts appends instructions and temporary buffers.
 */
import type { Instruction } from "../../schemas/plan.ts";
import { exchangeBlocks } from "./collectives/blockExchange.ts";
import { Emitter } from "./collectives/emitter.ts";
import { axesOf, blockAxesOf } from "./collectives/memoryAxes.ts";
import { RowExchange } from "./collectives/rowExchange.ts";
import type { BlockBuilder, ProgramBuilder, Reshard } from "./programBuilder.ts";

/** Returns the blocks of a stage with raw collectives in place of reshard steps; forward and backward by chunk. Adds temporary buffers. */
export function lowerCollectives(role: ProgramBuilder): {
  forward: Instruction[][];
  backward: Instruction[][];
  step: Instruction[];
  evaluation: Instruction[][];
  evaluationStep: Instruction[];
} {
  const emitter = new Emitter(role);
  const rows = new RowExchange(emitter);
  const expand = (i: Reshard): void => {
    emitter.begin(i);
    const [a, b] = [emitter.buffer(i.from), emitter.buffer(i.to)];
    // members of a group are in ascending order of rank: the sub-axis with the largest stride is the outermost
    const strideOf = (f: number): number => role.mesh.subAxes[f]?.stride ?? 0;
    const group = blockAxesOf(
      role.mesh,
      i.subAxes.toSorted((f, g) => strideOf(g) - strideOf(f)),
    );
    if (a.ragged && i.how !== "all_reduce" && i.how !== "all_reduce_max") rows.exchange(i, group);
    else exchangeBlocks(emitter, i, { have: axesOf(role.mesh, a, i.blockAxes, 0), want: axesOf(role.mesh, b, i.blockAxes, 0), group });
  };
  const lowerBlock = ({ list }: BlockBuilder): Instruction[] =>
    emitter.collect(() => {
      for (const i of list)
        if (i.kind === "reshard") expand(i);
        else emitter.emit(i);
    });
  const { forward, backward, step, evaluation, evaluationStep } = role.blocks;
  // forward first: backward reuses its routes in the opposite direction
  return {
    ...{ forward: forward.map(lowerBlock), backward: backward.map(lowerBlock), step: lowerBlock(step) },
    ...{ evaluation: evaluation.map(lowerBlock), evaluationStep: lowerBlock(evaluationStep) },
  };
}
