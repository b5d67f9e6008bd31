/** The turns of a pair: which instructions of its forward and of its backward follow one another. */
import type { PlacedView, PlanModel } from "./planModel.ts";
import type { StageRuns } from "./stageRuns.ts";

/** Consecutive instructions of one run of a pair. */
export interface TurnView {
  readonly run: number;
  readonly instructions: readonly PlacedView[];
}

/** Returns the turns of the pair whose forward is the run `first` of a stage; empty if the plan states none. */
export function turnsOf(model: PlanModel, stage: number, runs: StageRuns, first: number): TurnView[] {
  const [forward, backward] = [runs.chunk[first] ?? 0, runs.chunk[first + 1] ?? 0];
  const pair = model.view.stages[stage]?.pairs?.find((p) => p.forward === forward && p.backward === backward);
  const [a, b] = [model.block(stage, "forward", forward), model.block(stage, "backward", backward)];
  if (!pair || !a || !b) return [];
  const lists = [model.instructions(stage, a), model.instructions(stage, b)];
  const done = [0, 0];
  return pair.turns.flatMap((count, n): TurnView[] => {
    const side = n % 2;
    const from = done[side] ?? 0;
    done[side] = from + count;
    return count > 0 ? [{ run: first + side, instructions: (lists[side] ?? []).slice(from, from + count) }] : [];
  });
}
