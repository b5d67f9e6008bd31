/** The time source of the page: when each block run of a step begins and ends, and when its instructions do. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import type { Plan } from "../../../schemas/plan.ts";
import { type SimulatedStage, simulate } from "../../analysis/estimate/simulate.ts";
import { chunksPerStage } from "../../analysis/stages.ts";
import { bubbleOf, durationOf, timesOf } from "../../passes/schedule.ts";
import { type BlockSlots, type RunTimes, runKinds, type TimelineView } from "./planView.ts";

/** Returns the block runs of all stages: in seconds by a device profile, else in the units of the schedule, where a forward block is one. */
export function blockTimes(plan: Plan, profile: DeviceProfile | undefined): TimelineView {
  return profile ? secondsOf(plan, profile) : unitsOf(plan);
}

function unitsOf(plan: Plan): TimelineView {
  const pieces = timesOf(
    plan.programs.map(({ order }) => order),
    chunksPerStage(plan),
  );
  return {
    unit: "units",
    end: durationOf(pieces),
    bubble: bubbleOf(pieces),
    stages: pieces.map((stage) => runTimes(stage.map(({ run, start, end }) => ({ ...run, start, end })))),
    slots: [],
  };
}

/** By the simulation of the estimate; the step block is the last run of a stage. */
function secondsOf(plan: Plan, profile: DeviceProfile): TimelineView {
  const { seconds, stages } = simulate(plan, { profile, imbalance: 1 });
  return {
    unit: "seconds",
    end: seconds,
    bubble: stages.reduce((sum, { parts }) => sum + parts.bubble, 0) / (stages.length * seconds),
    stages: stages.map(({ runs, stepTimes }) => {
      const last = runs.at(-1)?.end ?? 0;
      const blocks = runs.map(({ run, start, end }) => ({ ...run, start, end }));
      const step = stepTimes.length === 0 ? [] : [{ kind: "step" as const, microbatch: 0, chunk: 0, start: last, end: seconds }];
      return runTimes([...blocks, ...step]);
    }),
    slots: stages.map((stage) => slotsOf(stage, seconds)),
  };
}

/** Returns the slots of the instructions of each block, by its last run that is alone: later runs are alike, and those of a pair alternate. */
function slotsOf({ runs, stepTimes }: SimulatedStage, seconds: number): BlockSlots[] {
  const isPaired = (at: number): boolean => runs[at]?.run.paired === true || runs[at - 1]?.run.paired === true;
  const alone = runs.filter((_, at) => !isPaired(at));
  const last = new Map([...runs, ...alone].map((run) => [`${run.run.kind} ${run.run.chunk}`, run]));
  const begin = runs.at(-1)?.end ?? 0;
  return [
    ...[...last.values()].map(({ run: { kind, chunk }, times }) => ({ kind, chunk, times: shares(times.times, 0, times.seconds) })),
    { kind: "step", chunk: 0, times: shares(stepTimes, begin, seconds - begin) },
  ];
}

/** Returns times as shares of a block with four digits. */
const shares = (times: Float64Array, start: number, length: number): number[] =>
  Array.from(times, (time) => Math.round((1e4 * (time - start)) / Math.max(length, 1e-12)) / 1e4);

interface TimedRun {
  readonly kind: (typeof runKinds)[number];
  readonly microbatch: number;
  readonly chunk: number;
  readonly start: number;
  readonly end: number;
  readonly paired?: true | undefined;
}

/** A tenth of a microsecond is exact enough for a drawing. */
const round = (time: number): number => Math.round(time * 1e7) / 1e7;

function runTimes(runs: readonly TimedRun[]): RunTimes {
  const paired = runs.flatMap((run, i) => (run.paired ? [i] : []));
  return {
    kind: runs.map(({ kind }) => runKinds.indexOf(kind)),
    microbatch: runs.map(({ microbatch }) => microbatch),
    chunk: runs.map(({ chunk }) => chunk),
    start: runs.map(({ start }) => round(start)),
    end: runs.map(({ end }) => round(end)),
    ...(paired.length > 0 && { paired }),
  };
}
