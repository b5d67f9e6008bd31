/** The estimate of a plan as a trace in seconds: the instructions of each chosen rank, with the tracks of a measured profile. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import { entryOf } from "../../../schemas/lookup.ts";
import type { Plan } from "../../../schemas/plan.ts";
import { stageOfRank } from "../../../schemas/sharding.ts";
import { estimate } from "../../analysis/estimate/estimate.ts";
import type { SimulatedStage } from "../../analysis/estimate/simulate.ts";
import { timingsOfRank } from "../../analysis/estimate/timings.ts";
import { sliceOfTiming } from "../../report/profile.ts";
import { type TracedRank, traceText } from "../../report/trace.ts";

/**
 * Yields the text of a trace of these ranks: the ids, ops and streams of `run --profile`, in the time of the estimate. `before` is called before each
 * rank with the number of ranks that are written.
 */
export function estimateTrace(
  plan: Plan,
  ranks: readonly number[],
  profile: DeviceProfile,
  before: (written: number) => void = () => undefined,
): Iterable<string> {
  const { mesh, job } = plan;
  const { simulation } = estimate(plan, { profile });
  const chosen = new Set(ranks.map((rank) => stageOfRank(mesh, rank)));
  const stages = new Map(simulation.stages.flatMap((stage) => (chosen.has(stage.stage) ? [[stage.stage, stage] as const] : [])));
  function* traced(): Generator<TracedRank> {
    for (const [written, rank] of ranks.entries()) {
      before(written);
      const stage = entryOf(stages, stageOfRank(mesh, rank), "stage");
      yield {
        ...{ rank, name: `rank ${rank}, estimate` },
        *slices() {
          for (const timing of timingsOfRank(rank, stage)) yield sliceOfTiming(timing);
        },
      };
    }
  }
  return traceText(traced(), tracksOf([...stages.values()]), {
    job: job.name,
    unit: "seconds by the estimate",
    profile: profile.name,
  });
}

/** Returns the streams of simulated stages, which are the tracks of each rank. */
const tracksOf = (stages: readonly SimulatedStage[]): string[] => {
  const blocks = new Set(stages.flatMap(({ runs, step }) => [...runs.map(({ block }) => block), step]));
  return [...new Set([...blocks].flatMap(({ instructions }) => instructions.map(({ stream }) => stream)))].sort();
};
