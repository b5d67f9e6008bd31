/** Chooses the values of the keys that a job leaves as `auto`: the fastest choice of a search in which all other keys are given. */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { type AutoKey, autoKeys, autoNames } from "../../schemas/job/autoKeys.ts";
import type { Target } from "../codegen/targets.ts";
import type { AutoChoice, AutoProblem, AutoRequest } from "../frontend/auto.ts";
import { bytesText } from "../units.ts";
import { asInJob, type FixedKeys, jobWith } from "./choice.ts";
import { search } from "./search.ts";

/** What the choice needs beside the job. */
export interface AutoSettings {
  /** Undefined if the device has none. */
  readonly profile: DeviceProfile | undefined;
  readonly target?: Target;
  readonly onProgress?: (line: string) => void;
}

/** Returns the values of the `auto` keys; the same for equal jobs and profiles. */
export function chooseAuto({ job, keys, writes }: AutoRequest, { profile, ...settings }: AutoSettings): AutoChoice | AutoProblem {
  const { device } = job.cluster;
  if (!profile) return { found: `no step can be estimated on ${device}: it has no device profile`, fix: "name a device in cluster.device" };
  const fixed = fixedBut(job, keys);
  const given = {
    sequence: writes.sequence || !keys.includes("tensor"),
    layout: writes.layout || !(keys.includes("pipeline") || keys.includes("virtual_pipeline")),
    distributed_optimizer: true,
  };
  const { best, tooLarge, ruledOut, choices, memory, reserve } = search(job, { ...settings, profile, fixed, given });
  const [winner] = best;
  const [least] = tooLarge;
  const [rule] = ruledOut;
  if (!winner)
    return {
      found: least
        ? `nothing fits: the least memory found is ${bytesText(least.peak)}, and ${device} has ${bytesText(memory + reserve)}, of which the driver and NCCL need ${bytesText(reserve)}`
        : `none of ${choices} choices is valid${rule ? `: most break ${rule.reason}` : ", because none divides the ranks and the batch"}`,
      fix: "rankc search JOB lists what was ruled out; make more keys auto, or use more ranks",
    };
  const chosen = jobWith(job, winner.choice, given);
  const values: Record<string, unknown> = {};
  for (const key of keys) values[autoKeys[key]] = key === "recompute" ? chosen.train.recompute.mode : winner.choice[key];
  const { recompute } = chosen.train;
  if (keys.includes("recompute") && recompute.mode === "selective") values["train.recompute.modules"] = recompute.modules;
  const { sequence, layout } = chosen.parallel;
  if (!given.sequence && sequence !== job.parallel.sequence) values["parallel.sequence"] = sequence;
  if (!given.layout && layout !== job.parallel.layout) values["parallel.layout"] = layout;
  return { values, seconds: winner.seconds, profile: profile.name, choices, plans: best.length + tooLarge.length };
}

/** Returns the values that a job has for all keys that a search decides, but for some. */
export const fixedBut = (job: AutoRequest["job"], keys: AutoRequest["keys"]): FixedKeys => ({
  ...Object.fromEntries(autoNames.filter((key) => !keys.includes(key)).map((key) => [key, givenValue(job, key)])),
  ...asInJob,
});

const givenValue = ({ parallel, train }: AutoRequest["job"], key: AutoKey) =>
  key === "micro_batch" ? train.micro_batch : key === "recompute" ? "job" : parallel[key];
