/** A rule is one declaration; its diagnostic, its `explain` page and its test derive from it. */
import type { Job } from "../../schemas/job.ts";

type PathOf<T> = T extends readonly unknown[]
  ? never
  : T extends object
    ? { [K in keyof T & string]: K | `${K}.${PathOf<NonNullable<T[K]>>}` }[keyof T & string]
    : never;

/** Every key of a job, dotted: a rule that points at a key that does not exist does not compile. */
export type JobPath = PathOf<Job>;

export interface RuleResult {
  readonly at: JobPath;
  /** Other keys that take part in the disagreement. */
  readonly related?: readonly JobPath[];
  readonly found: string;
  readonly fix: string;
  /** Changes that may cure it, the best first. The first that cures it and breaks nothing else becomes the finding's `set`. */
  readonly tries?: Iterable<{ readonly [P in JobPath]?: unknown }>;
}

export interface Rule {
  readonly code: string;
  readonly title: string;
  readonly why: string;
  readonly level: "error" | "warning";
  readonly check: (job: Job) => Iterable<RuleResult>;
  /** Whether `check` finds nothing, where that costs less to know than what it would say. */
  readonly holds?: (job: Job) => boolean;
  /** YAML laid over the smallest valid job, on which this rule speaks and no other. */
  readonly bad: string;
}
export const rule = (r: Rule): Rule => r;

/** Whether a float32 of this number is at least 0 and below 1. */
export const isShare = (n: number): boolean => n >= 0 && Math.fround(n) < 1;

/** Degrees that divide `n` (of a very large one, some), those closest to `near` first, the smaller of two equals first. */
export function divisorsNear(n: number, near: number): number[] {
  const found: number[] = [];
  for (let d = 1; d * d <= n && d <= 2 ** 14; d++) if (n % d === 0) found.push(d, n / d);
  const far = (d: number) => Math.abs(Math.log(d / near));
  return [...new Set(found)].sort((a, b) => far(a) - far(b) || a - b);
}

/** The multiple of `step` at or above `n`. */
export const upTo = (n: number, step: number): number => Math.ceil(n / step) * step;
export const downTo = (n: number, step: number): number => Math.max(step, Math.floor(n / step) * step);
