/** The schedule of a plan as a trace: the block runs of each chosen rank. */
import type { Plan } from "../../../schemas/plan.ts";
import { blockTag } from "../../../schemas/program.ts";
import { stageOfRank } from "../../../schemas/sharding.ts";
import { chunksPerStage } from "../../analysis/stages.ts";
import { type Piece, timesOf } from "../../passes/schedule.ts";
import { type TracedRank, type TraceSlice, traceText } from "../../report/trace.ts";

/** Where the times of block runs come from: microseconds of each block run of a stage, in order. */
export interface TraceTimes {
  /** What one microsecond of the trace means. */
  readonly unit: string;
  readonly slices: readonly (readonly TraceSlice[])[];
}

/** Microseconds of a trace per unit of a schedule, so that a unit reads as a millisecond. */
const UNIT = 1000;

/** Returns the times of a schedule in units of a forward block: dependencies, not seconds. */
export function scheduleTimes({ programs }: Plan): TraceTimes {
  const chunks = chunksPerStage({ programs });
  const slice = ({ run, start, end }: Piece): TraceSlice => ({
    stream: "compute",
    ...{ name: blockTag(run, chunks), category: run.kind, begin_us: start * UNIT, end_us: end * UNIT },
  });
  const stages = timesOf(
    programs.map(({ order }) => order),
    chunks,
  );
  return { unit: "a millisecond is the duration of a forward block", slices: stages.map((pieces) => pieces.map(slice)) };
}

/** Yields the text of a trace of these ranks. */
export function scheduleTrace(plan: Plan, ranks: readonly number[], { unit, slices }: TraceTimes): Iterable<string> {
  const { mesh, job } = plan;
  const streams = [...new Set(slices.flat().map(({ stream }) => stream))].sort();
  const traced = ranks.map((rank): TracedRank => {
    const stage = stageOfRank(mesh, rank);
    return { rank, name: `rank ${rank}, stage ${stage}`, slices: () => slices[stage] ?? [] };
  });
  return traceText(traced, streams, { job: job.name, unit });
}
