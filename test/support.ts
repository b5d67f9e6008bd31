/** What several laws need: a job from a few lines of YAML, and how far two tensors are apart. */
import { stringify } from "yaml";
import { type Job, ParallelText } from "../schemas/job.ts";
import { readJob } from "../src/readJob.ts";

/** A valid job; throws with the findings where it is not. */
export function jobOf(value: object, sets: readonly string[] = []): Job {
  const { job, findings } = readJob(stringify(value), "test.yaml", sets);
  if (!job) throw new Error(findings.map((f) => `${f.code} ${f.path}: ${f.found} (${f.fix})`).join("\n"));
  return job;
}

/** Degrees of parallelism, the others as a job that says nothing has them. */
export const parallelOf = (over: Partial<Job["parallel"]>): Job["parallel"] => ({ ...ParallelText.parse({}), data: 1, ...over });

/** ‖a - b‖ / ‖b‖ */
export function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) throw new Error(`${a.length} elements against ${b.length}`);
  let apart = 0;
  let size = 0;
  for (let i = 0; i < b.length; i++) {
    apart += (a[i]! - b[i]!) ** 2;
    size += b[i]! ** 2;
  }
  return Math.sqrt(apart) / (Math.sqrt(size) || 1);
}

export const fixture = (path: string): string => new URL(`fixtures/${path}`, import.meta.url).pathname;
