/** Two plans or jobs that a command compares: loads both, and says of which job each finding is. */
import { printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { Finding } from "../frontend/diagnostic.ts";
import { InvalidJob, isPlanPath, type LoadedPlan, loadPlan, printFindings } from "./loadPlan.ts";
import type { JobOptions } from "./options.ts";
import { printStderr } from "./output.ts";

/** One of the two: its path, and the changes of a job. */
export interface Side extends JobOptions {
  readonly path: string;
}

type Pair<T> = readonly [T, T];

/**
 * Loads both sides. `targetOf` returns the target that a job is compiled for, given the plan on the other side if that is no job. Prints the findings
 * of both jobs once, then those of each under its name. Throws a Trouble if a job is invalid: exit code 1 may mean that the plans differ.
 */
export async function loadBoth(
  command: string,
  sides: Pair<Side>,
  targetOf: (beside: LoadedPlan | undefined) => string | undefined,
): Promise<[LoadedPlan, LoadedPlan]> {
  const findings: Pair<Finding[]> = [[], []];
  const loaded: (LoadedPlan | undefined)[] = [undefined, undefined];
  let isInvalid = false;
  // plans first: their targets are those of the jobs
  const order = ([0, 1] as const).toSorted((a, b) => Number(isPlanPath(sides[b].path)) - Number(isPlanPath(sides[a].path)));
  try {
    for (const s of order) {
      const { path, ...options } = sides[s];
      const beside = loaded[1 - s];
      const target = isPlanPath(path) ? undefined : targetOf(isPlanPath(sides[1 - s]?.path ?? path) ? beside : undefined);
      try {
        loaded[s] = await loadPlan(path, options, target, async (found) => void findings[s].push(...found));
      } catch (error) {
        if (!(error instanceof InvalidJob)) throw error;
        isInvalid = true;
      }
    }
  } finally {
    await printOfSides(sides, findings);
  }
  const [a, b] = loaded;
  if (isInvalid || !a || !b) throw new Trouble(`${command} needs valid jobs`, "fix the findings above; rankc check prints them too");
  return [a, b];
}

/** Prints findings of both jobs once, then those of each job alone. */
async function printOfSides(sides: Pair<Side>, [a, b]: Pair<readonly Finding[]>): Promise<void> {
  const keyOf = ({ code, path, found }: Finding): string => JSON.stringify([code, path, found]);
  const [ofA, ofB] = [a, b].map((findings) => new Set(findings.map(keyOf)));
  const groups: readonly (readonly [whose: string, findings: readonly Finding[]])[] = [
    ["both jobs", a.filter((finding) => ofB?.has(keyOf(finding)))],
    [sideName(sides[0]), a.filter((finding) => !ofB?.has(keyOf(finding)))],
    [sideName(sides[1]), b.filter((finding) => !ofA?.has(keyOf(finding)))],
  ];
  for (const [n, [whose, findings]] of groups.filter((group) => group[1].length > 0).entries()) {
    printStderr(`${n > 0 ? "\n" : ""}${whose}:`);
    await printFindings(findings);
  }
}

/** Returns the arguments that make a side: `job.yaml --set parallel.tensor=4`. */
const sideName = ({ path, set, overlay }: Side): string =>
  printable([path, ...overlay.map((file) => `-f ${file}`), ...set.map((change) => `--set ${change}`)].join(" "), 400);
