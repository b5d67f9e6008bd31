/** The declaration of a rule. Its finding, its explanation and its test derive from it. */
import type { Job } from "../../schemas/job.ts";

type PathOf<T> = T extends readonly unknown[]
  ? never
  : T extends object
    ? { [K in keyof T & string]: K | `${K}.${PathOf<NonNullable<T[K]>>}` }[keyof T & string]
    : never;

/** Every key of a job, dotted. A rule with an unknown key does not compile. */
export type JobPath = PathOf<Job>;

/** A violation of a rule. */
export interface RuleResult {
  readonly at: JobPath;
  /** Other keys of the conflict. */
  readonly related?: readonly JobPath[];
  readonly found: string;
  readonly fix: string;
  /**
   * A change after which the run has the same numbers and which nobody would decide otherwise: it leaves out what has no effect, or writes the one
   * legal value. `undefined` leaves a key out. `check --fix` applies it; it is tried before `tries`.
   */
  readonly safe?: { readonly [P in JobPath]?: unknown };
  /** Candidate changes, the best first. The first that removes the finding and causes no other becomes the tested fix `set`. */
  readonly tries?: Iterable<{ readonly [P in JobPath]?: unknown }>;
}

/** A rule over a job. */
export interface Rule {
  readonly code: string;
  readonly title: string;
  readonly why: string;
  readonly level: "error" | "warning";
  readonly check: (job: Job) => Iterable<RuleResult>;
  /** A cheaper test of whether `check` finds nothing. */
  readonly holds?: (job: Job) => boolean;
  /** YAML that is merged into the smallest valid job; only this rule then has a finding. */
  readonly bad: string;
}
/** Declares a rule; gives literals the type of Rule. */
export const rule = (r: Rule): Rule => r;

/** Returns whether a number is in [0, 1) as a float32. */
export const isShare = (n: number): boolean => n >= 0 && Math.fround(n) < 1;

/** Returns the divisors of `n` (for a very large n, some), by distance to `near`, then ascending. */
export function divisorsNear(n: number, near: number): number[] {
  const found: number[] = [];
  for (let d = 1; d * d <= n && d <= 2 ** 14; d++) if (n % d === 0) found.push(d, n / d);
  const far = (d: number) => Math.abs(Math.log(d / near));
  return [...new Set(found)].sort((a, b) => far(a) - far(b) || a - b);
}

/** Returns the smallest multiple of `step` that is at least `n`. */
export const upTo = (n: number, step: number): number => Math.ceil(n / step) * step;
/** Returns the largest multiple of `step` that is at most `n`, but at least `step`. */
export const downTo = (n: number, step: number): number => Math.max(step, Math.floor(n / step) * step);
