/** What several laws need: a job from a few lines of YAML, and how far two tensors are apart. */
import { stringify } from "yaml";
import { ParallelText } from "../../schemas/job/parallel.ts";
import type { Job } from "../../schemas/job.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { positionOf } from "../../src/ops/positions.ts";

/** A valid job; throws with the findings where it is not. */
export function jobOf(value: object, sets: readonly string[] = []): Job {
  const { job, findings } = readJob(stringify(value), "test.yaml", sets);
  if (!job) throw new Error(findings.map((f) => `${f.code} ${f.path}: ${f.found} (${f.fix})`).join("\n"));
  return job;
}

/** Degrees of parallelism; those that are not given have their defaults. */
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

/** Whether two tensors hold the same numbers; `toEqual` takes longer for the elements of a model than its training does. */
export const sameNumbers = (a: ArrayLike<number>, b: ArrayLike<number>): boolean =>
  a.length === b.length && Array.prototype.every.call(a, (x, i) => Object.is(x, b[i]));

/** The sections of a job for a mesh, which may also say how many GPUs a node has. */
export function meshOf(placed: object): object {
  const { gpus_per_node = 8, ...parallel } = placed as { readonly gpus_per_node?: number };
  return { parallel, cluster: { gpus_per_node } };
}

export const fixture = (path: string): string => new URL(`../fixtures/${path}`, import.meta.url).pathname;

/** A watched value [B,S,…] with the tokens of each sequence by their positions, however they lay over context ranks. */
export function byPosition({ shape, data }: { readonly shape: readonly number[]; readonly data: Float32Array }, job: Job): Float32Array {
  const { context } = job.parallel;
  const [, S, ...rest] = shape as [number, number];
  const width = rest.reduce((a, b) => a * b, 1);
  const out = new Float32Array(data.length);
  for (let t = 0; t * width < data.length; t++) {
    const to = t - (t % S) + positionOf(t % S, context > 1 ? S / (2 * context) : 0, context);
    out.set(data.subarray(t * width, (t + 1) * width), to * width);
  }
  return out;
}
