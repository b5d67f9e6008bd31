/**
 * The two tiers of tests. `npm test` runs the fast tier: one representative of each family of proof, the same random draws each time.
 * `npm run test:full` (RANKC_TEST=full) runs every test, with all draws. A test that belongs to the full tier alone has the tag `full`.
 */

/** Whether this run is of the full tier. */
export const isFull = process.env.RANKC_TEST === "full";

/** CPU seconds that the test files of the fast tier may take together: with the checks before them `npm test` stays below 10 minutes of CPU time. */
export const FAST_BUDGET = 500;

/** Files that start first, so that no core waits for one of them at the end. A fresh clone has no recorded durations. */
export const longestFiles = [
  "cuda-compile",
  "wgsl-contract",
  "webgpu-run",
  "oracles",
  "cuda-whole",
  "package",
  "checkpoint",
  "cuda-contract",
  "mesh-law",
  "docs",
];

/** The tag of tests that run in the full tier alone. */
export const full = { tags: ["full"] };

/** The number of random draws in this tier; RANKC_RUNS overrides both. */
export const draws = (inFast: number, inFull: number): number => Number(process.env.RANKC_RUNS ?? (isFull ? inFull : inFast));

interface Tier<T> {
  /** Options for `test.each`: the rows of the second tier carry the tag `full`. */
  readonly options: { readonly tags?: string[] };
  readonly rows: T[];
}

/** Splits the rows of a table of tests in two: those for which `isFast` holds, which run in both tiers, and the others. */
export function byTier<T>(rows: readonly T[], isFast: (row: T, index: number) => boolean): [Tier<T>, Tier<T>] {
  return [
    { options: {}, rows: rows.filter(isFast) },
    { options: full, rows: rows.filter((row, i) => !isFast(row, i)) },
  ];
}

/** A function that calls `make` the first time and returns the same value from then on: what a tier leaves out is not made. */
export function once<T>(make: () => T): () => T {
  let made: { readonly value: T } | undefined;
  return () => (made ??= { value: make() }).value;
}
