/** The choice of a new job: that of a search by its forecast alone, without a compiled program. */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { deviceOf } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
import { memoryForecast } from "../analysis/memoryForecast.ts";
import { jobRules } from "../rules/jobRules.ts";
import { choicesOf, type FixedKeys, type JobChoice, jobWith } from "./choice.ts";
import { type ForecastBase, forecastBase, forecastSeconds } from "./forecast.ts";

/** What the choice needs beside the job. */
export interface FirstChoiceSettings {
  readonly profile: DeviceProfile;
  readonly fixed: FixedKeys;
  /** The share of the device's memory that the forecast may fill: the rest is for what it leaves out. */
  readonly filled: number;
  /** Returns the job for a choice before its degrees are set: its batch, and the bound of rows. */
  readonly prepared: (choice: JobChoice) => Job;
}

/** Choices that break a rule, or do not fit, are passed over up to this number: a model that fits nowhere ends the list. */
const MOST = 20_000;

/**
 * Returns the first job, by forecast seconds of a sequence, that breaks no rule and fits by forecast; a job without warnings goes before one with them.
 * Undefined if none fits. `job`: for the number of ranks, with a batch that all data ranks divide.
 */
export function firstChoice(job: Job, { profile, fixed, filled, prepared }: FirstChoiceSettings): Job | undefined {
  const { memory, links } = deviceOf(job.cluster.device);
  // one process has the memory of all ranks on a device without links
  const fits = (own: Job): boolean => memoryForecast(own) * (links === null ? own.parallel.world : 1) <= filled * memory;
  const bases = new Map<number, ForecastBase>();
  const baseOf = (own: Job): ForecastBase => {
    const { global_batch } = own.train;
    const known = bases.get(global_batch) ?? forecastBase(own, profile);
    bases.set(global_batch, known);
    return known;
  };
  const all = [...choicesOf(job, fixed)].map((choice) => {
    const own = prepared(choice);
    return { choice, own, seconds: forecastSeconds(baseOf(own), choice) / own.train.global_batch };
  });
  let warned: Job | undefined;
  for (const { choice, own } of all.sort((a, b) => a.seconds - b.seconds).slice(0, MOST)) {
    const candidate = jobWith(own, choice);
    if (!fits(candidate)) continue;
    const broken = jobRules.flatMap((rule) => ([...rule.check(candidate)].length > 0 ? [rule.level] : []));
    if (broken.length === 0) return candidate;
    if (!broken.includes("error")) warned ??= candidate;
  }
  return warned;
}
