/**
 * Keys that a job leaves to rankc: `parallel.tensor: auto`. What chooses their values stands above the frontend (src/search) and is handed in;
 * the values then take the place of `auto` in the source, so that rules and the plan see them.
 */
import { type AutoKey, autoKeys, autoNames } from "../../schemas/job/autoKeys.ts";
import type { Job } from "../../schemas/job.ts";
import type { Finding } from "./diagnostic.ts";
import { copy, isObject, type Source, setPath, textFaults, textFinding, valueAt } from "./source.ts";

/** A job whose keys are to be chosen. */
export interface AutoRequest {
  /** The job with the smallest value, or none, in place of `auto`. */
  readonly job: Job;
  readonly keys: readonly AutoKey[];
  /** Whether the file writes parallel.sequence and parallel.layout, which follow from the choice otherwise. */
  readonly writes: { readonly sequence: boolean; readonly layout: boolean };
}

/** The values that were chosen. */
export interface AutoChoice {
  /** Values by path, also of keys that follow from them. */
  readonly values: Readonly<Record<string, unknown>>;
  /** The estimated seconds of a step, by the profile of this name. */
  readonly seconds: number;
  readonly profile: string;
  /** Choices that were considered, and plans that were compiled. */
  readonly choices: number;
  readonly plans: number;
}

/** Why no values can be chosen, and the way out. */
export interface AutoProblem {
  readonly found: string;
  readonly fix: string;
}

/** Chooses the values of `auto` keys. */
export type ChooseAuto = (request: AutoRequest) => Promise<AutoChoice | AutoProblem>;

/** Returns the keys that a source leaves to rankc. */
export const autoKeysIn = ({ value }: Source): AutoKey[] => autoNames.filter((key) => valueAt(value, autoKeys[key].split(".")) === "auto");

/** Returns a source with other values. `chosen`: paths that rankc has chosen. */
export function withValues(source: Source, values: Readonly<Record<string, unknown>>, chosen?: ReadonlySet<string>): Source {
  if (!isObject(source.value)) return source;
  const value = copy(source.value);
  for (const [path, own] of Object.entries(values)) setPath(value, path.split("."), own);
  return { ...source, value, ...(chosen && { chosen }) };
}

/** Returns a source in which `auto` is the smallest value, so that its other keys can be read. */
export const withoutAuto = (source: Source, keys: readonly AutoKey[]): Source =>
  withValues(source, Object.fromEntries(keys.map((key) => [autoKeys[key], key === "recompute" ? "none" : 1])));

/** Returns the request of a job. */
export const autoRequest = (job: Job, source: Source, keys: readonly AutoKey[]): AutoRequest => {
  const has = (path: string): boolean => valueAt(source.value, path.split(".")) !== undefined;
  return { job, keys, writes: { sequence: has("parallel.sequence"), layout: has("parallel.layout") } };
};

/** Returns the finding of a job whose `auto` keys cannot be chosen. */
export function autoFinding(source: Source, [key]: readonly AutoKey[], { found, fix }: AutoProblem): Finding {
  const path = key === undefined ? "" : autoKeys[key];
  const at = source.at(path);
  return at ? textFinding(textFaults.auto, path, found, fix, at) : { ...textFinding(textFaults.auto, path, found, fix, { set: path }) };
}

/** Returns the chosen values as one line: `parallel.tensor=2 parallel.pipeline=1`. */
export const chosenText = ({ values }: Pick<AutoChoice, "values">): string =>
  Object.entries(values)
    .map(([path, value]) => `${path}=${Array.isArray(value) ? `[${value.join(",")}]` : String(value)}`)
    .join(" ");
