/** How the best choice of a search differs from the job as its file has it: one change after another, with what each saves and why. */
import type { Job } from "../../schemas/job.ts";
import { peakOf } from "../rules/all.ts";
import { asInJob, type JobChoice, jobWith, type KeptKeys, type SearchedKey, searchedKeys } from "./choice.ts";
import { estimateJob, type JobEstimateOptions } from "./estimateJob.ts";
import { type ForecastBase, forecast, nodesOf } from "./forecast.ts";
import { firstError, type TimedPlan, timedPlan } from "./timedPlan.ts";

/** The change of a key. */
export interface ChoiceChange {
  readonly key: SearchedKey;
  readonly from: number | string;
  readonly to: number | string;
}

/** One step from the job as written to the best choice. */
export interface ChangeStep extends TimedPlan {
  /** Keys that change together, because rules allow none of them alone; none: the layout and other keys that follow from a choice. */
  readonly changes: readonly ChoiceChange[];
  /** Seconds that the step saves; negative if it costs time and a later one pays for it. */
  readonly saved: number;
  /** The part of the step's time that changes most, and by how much it is shorter. */
  readonly part: { readonly name: string; readonly saved: number };
  /** Why, where groups of ranks lie on other nodes than before. */
  readonly reason?: string;
}

/** What the comparison needs beside the jobs. */
export interface WrittenSettings extends JobEstimateOptions {
  readonly base: ForecastBase;
  readonly given: KeptKeys;
}

/** Returns the choice that a job has. */
export const choiceOfJob = ({ parallel: p, train }: Job): JobChoice => ({
  ...{ tensor: p.tensor, pipeline: p.pipeline, virtual_pipeline: p.virtual_pipeline, context: p.context },
  ...{
    expert: p.expert,
    expert_tensor: p.expert_tensor,
    micro_batch: train.micro_batch,
    recompute: train.recompute.mode === "none" ? "none" : "job",
  },
  ...asInJob,
});

/** Changes below this share of a step are not told. */
const SMALL = 0.002;

/** Returns the steps from a job to a choice: always the change that the forecast expects to save most, of those that rules allow. */
export function stepsFrom(job: Job, written: TimedPlan, best: JobChoice, settings: WrittenSettings): ChangeStep[] {
  const { base, given, ...options } = settings;
  const steps: ChangeStep[] = [];
  let [at, before] = [choiceOfJob(job), written];
  const take = (changes: readonly ChoiceChange[], next: JobChoice): void => {
    const candidate = jobWith(job, next, given);
    const timed = timedPlan(estimateJob(candidate, options), peakOf(candidate, options.target).bytes);
    const saved = before.seconds - timed.seconds;
    const reason = reasonOf(base, at, next);
    steps.push({ ...timed, changes, saved, part: mostChanged(before, timed), ...(reason !== undefined && { reason }) });
    [at, before] = [next, timed];
  };
  take([], at);
  for (let left = searchedKeys.filter((key) => best[key] !== at[key]); left.length > 0; ) {
    const next = cheapest(job, at, best, left, settings);
    take(
      next.map((key) => ({ key, from: at[key], to: best[key] })),
      withKeys(at, best, next),
    );
    left = left.filter((key) => !next.includes(key));
  }
  return steps.filter(({ changes, saved, seconds }) => changes.length > 0 || Math.abs(saved) > SMALL * seconds);
}

const withKeys = (at: JobChoice, best: JobChoice, keys: readonly SearchedKey[]): JobChoice => ({
  ...at,
  ...Object.fromEntries(keys.map((key) => [key, best[key]])),
});

/** Returns the key whose change alone is valid and forecast fastest; else the fewest pair; else all that are left. */
function cheapest(job: Job, at: JobChoice, best: JobChoice, left: readonly SearchedKey[], { base, given }: WrittenSettings): SearchedKey[] {
  const pairs = left.flatMap((a, n) => left.slice(n + 1).map((b) => [a, b]));
  for (const groups of [left.map((key) => [key]), pairs]) {
    const valid = groups
      .map((keys) => ({ keys, choice: withKeys(at, best, keys) }))
      .filter(({ choice }) => dividesRanks(job, choice) && firstError(jobWith(job, choice, given)) === undefined)
      .map(({ keys, choice }) => ({ keys, seconds: forecast(base, choice).seconds }))
      .sort((a, b) => a.seconds - b.seconds);
    const [first] = valid;
    if (first) return first.keys;
  }
  return [...left];
}

/** Returns whether the degrees of a choice divide the ranks, the layers' places and the batch, so that a job with it can be formed. */
function dividesRanks({ parallel: { world }, train }: Job, c: JobChoice): boolean {
  const data = world / (c.tensor * c.pipeline * c.context);
  const ofExperts = world / (c.pipeline * c.expert * c.expert_tensor);
  return [data, ofExperts, train.global_batch / (c.micro_batch * data)].every((n) => Number.isInteger(n) && n >= 1);
}

function mostChanged(before: TimedPlan, after: TimedPlan): ChangeStep["part"] {
  const names = [...new Set([...Object.keys(before.parts), ...Object.keys(after.parts)])];
  const changes = names.map((name) => ({ name, saved: (before.parts[name] ?? 0) - (after.parts[name] ?? 0) }));
  const sign = before.seconds >= after.seconds ? 1 : -1;
  return changes.reduce((a, b) => (sign * b.saved > sign * a.saved ? b : a), { name: "none", saved: 0 });
}

/** Returns on how many nodes the groups are whose ranks change, if they are on more or fewer than before. */
function reasonOf(base: ForecastBase, from: JobChoice, to: JobChoice): string | undefined {
  const [before, after] = [nodesOf(base, from), nodesOf(base, to)];
  const texts = (["expert", "tensor", "context"] as const).flatMap((axis) => {
    if (from[axis] === to[axis] || before[axis] === after[axis]) return [];
    const where = (nodes: number): string => (nodes === 1 ? "inside a node" : `on ${nodes} nodes`);
    return [`${axis} groups of ${to[axis]} are ${where(after[axis])}, those of ${from[axis]} ${where(before[axis])}`];
  });
  return texts.length === 0 ? undefined : texts.join("; ");
}
