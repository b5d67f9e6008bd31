/** The estimate of a plan as a trace in seconds: the instructions of each chosen rank, with the tracks of a measured profile. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import type { Plan } from "../../../schemas/plan.ts";
import { stageOfRank } from "../../../schemas/sharding.ts";
import { estimate } from "../../analysis/estimate/estimate.ts";
import { timingsOf } from "../../analysis/estimate/timings.ts";
import { profileTracks, sliceOfTiming } from "../../report/profile.ts";
import { type TracedRank, traceText } from "../../report/trace.ts";

/** Yields the text of a trace of these ranks: the ids, ops and streams of `run --profile`, in the time of the estimate. */
export function estimateTrace(plan: Plan, ranks: readonly number[], profile: DeviceProfile): Iterable<string> {
  const { mesh, job } = plan;
  const { simulation } = estimate(plan, { profile });
  const stages = new Set(ranks.map((rank) => stageOfRank(mesh, rank)));
  const timings = new Map(
    simulation.stages.filter(({ stage }) => stages.has(stage)).map((stage) => [stage.stage, timingsOf(plan, { stages: [stage] })]),
  );
  const traced = ranks.map((rank): TracedRank => {
    const stage = stageOfRank(mesh, rank);
    return {
      ...{ rank, name: `rank ${rank}, estimate` },
      *slices() {
        for (const timing of timings.get(stage) ?? []) yield sliceOfTiming(timing);
      },
    };
  });
  return traceText(traced, profileTracks([...timings.values()].flat()), {
    job: job.name,
    unit: "seconds by the estimate",
    profile: profile.name,
  });
}
