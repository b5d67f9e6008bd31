/** Where no choice fits: which given keys conflict with each other and the device, and what would fit. */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import type { Job } from "../../schemas/job.ts";
import type { Target } from "../codegen/targets.ts";
import { peakOf } from "../rules/all.ts";
import { jobRules } from "../rules/jobRules.ts";
import { choicesOf, type FixedKeys, type JobChoice, jobWith, type KeptKeys, type SearchedKey } from "./choice.ts";
import { forecast, forecastBase } from "./forecast.ts";

/** What is searched, as for `search`. */
export interface ConflictSettings {
  readonly profile: DeviceProfile;
  readonly target: Target;
  readonly fixed: FixedKeys;
  readonly given: KeptKeys;
  /** Bytes that a plan may take. */
  readonly memory: number;
}

/** A choice that fits after a change. */
export interface WayOut {
  /** The given key that is left out, or the number of ranks. */
  readonly change: { readonly leaveOut: SearchedKey } | { readonly ranks: number };
  readonly choice: JobChoice;
  readonly peak: number;
}

/** Why nothing fits. */
export interface Conflict {
  /** The fewest given keys with which nothing fits; none: nothing fits with any values. */
  readonly keys: readonly SearchedKey[];
  readonly waysOut: readonly WayOut[];
}

/** Choices with the least memory by forecast whose exact memory is computed. */
const TRIED = 8;
/** The largest multiple of the ranks that is tried. */
const MOST_RANKS = 64;

/** Returns the given keys that conflict, and what would fit. `fixed`: keys with which nothing fits. */
export function conflictOf(job: Job, settings: ConflictSettings): Conflict {
  const { fixed } = settings;
  const names = Object.keys(fixed) as SearchedKey[];
  const without = (keys: FixedKeys, name: SearchedKey): FixedKeys =>
    Object.fromEntries(Object.entries(keys).filter(([key]) => key !== name));
  // a key stays in the conflict if something fits without it
  let keys = fixed;
  for (const name of names) if (!fittingChoice(job, settings, without(keys, name))) keys = without(keys, name);
  const waysOut: WayOut[] = [];
  for (const leaveOut of Object.keys(keys) as SearchedKey[]) {
    const found = fittingChoice(job, settings, without(fixed, leaveOut));
    if (found) waysOut.push({ change: { leaveOut }, ...found });
  }
  const { world } = job.parallel;
  for (let ranks = 2 * world; ranks <= MOST_RANKS * world; ranks *= 2) {
    const nodes = Math.ceil(ranks / job.cluster.gpus_per_node);
    const larger = { ...job, parallel: { ...job.parallel, world: ranks }, cluster: { ...job.cluster, nodes } };
    const found = fittingChoice(larger, settings, fixed);
    if (!found) continue;
    waysOut.push({ change: { ranks }, ...found });
    break;
  }
  return { keys: Object.keys(keys) as SearchedKey[], waysOut };
}

/** Returns a choice that fits: the first of those with the least memory by forecast. */
function fittingChoice(job: Job, { profile, target, given, memory }: ConflictSettings, fixed: FixedKeys) {
  const base = forecastBase(job, profile);
  const all = [...choicesOf(job, fixed)].map((choice) => ({ choice, bytes: forecast(base, choice).bytes }));
  let tried = 0;
  for (const { choice } of all.sort((a, b) => a.bytes - b.bytes)) {
    const candidate = jobWith(job, choice, given);
    if (jobRules.some((rule) => rule.level === "error" && [...rule.check(candidate)].length > 0)) continue;
    const { bytes: peak } = peakOf(candidate, target);
    if (peak <= memory) return { choice, peak };
    if (++tried >= TRIED) return undefined;
  }
  return undefined;
}
