/** Chooses the values of `auto` keys for the commands: by a search, or as an earlier command chose them for the same job. */
import type { AutoChoice, AutoProblem, AutoRequest } from "../frontend/auto.ts";
import { knownAnswers } from "./cache.ts";
import { endProgress, occasionalProgress } from "./output.ts";

/** Returns the values of the `auto` keys of a job. */
export async function resolveAuto(request: AutoRequest): Promise<AutoChoice | AutoProblem> {
  const key = JSON.stringify(request);
  const known = knownAnswers.get(key);
  if (known) return known;
  const [{ chooseAuto }, { packageProfile }, { loadDeviceTargets }] = await Promise.all([
    import("../search/chooseAuto.ts"),
    import("../analysis/estimate/profiles.ts"),
    import("../codegen/targets.ts"),
  ]);
  const { device } = request.job.cluster;
  const print = occasionalProgress();
  const profile = packageProfile(device);
  const target = (await loadDeviceTargets())(device);
  const answer = chooseAuto(request, { profile, target, onProgress: (line) => print(`auto: ${line}`) });
  endProgress();
  knownAnswers.set(key, answer);
  return answer;
}
