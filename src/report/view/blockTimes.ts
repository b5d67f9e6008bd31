/** The time source of the page: when each block run of a step begins and ends. */
import type { Plan } from "../../../schemas/plan.ts";
import { chunksPerStage } from "../../analysis/stages.ts";
import { bubbleOf, durationOf, timesOf } from "../../passes/schedule.ts";
import { type RunTimes, runKinds, type TimelineView } from "./planView.ts";

/** Returns the block runs of all stages in the units of the schedule: a forward block is one. */
export function blockTimes(plan: Plan): TimelineView {
  const pieces = timesOf(
    plan.programs.map(({ order }) => order),
    chunksPerStage(plan),
  );
  return {
    unit: "units",
    end: durationOf(pieces),
    bubble: bubbleOf(pieces),
    stages: pieces.map(
      (stage): RunTimes => ({
        kind: stage.map(({ run }) => runKinds.indexOf(run.kind)),
        microbatch: stage.map(({ run }) => run.microbatch),
        chunk: stage.map(({ run }) => run.chunk),
        start: stage.map(({ start }) => start),
        end: stage.map(({ end }) => end),
      }),
    ),
  };
}
