/** Reads a job from YAML text. Returns all findings with their places; there is no job if one of them is an error. */
import type { Device } from "../../schemas/devices.ts";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import type { Target } from "../codegen/targets.ts";
import { idleEntries } from "../rules/allow.ts";
import { findingsOfMemory, jobFindings } from "../rules/index.ts";
import { needsPrograms, type Peak, type PeakOf } from "../rules/memory.ts";
import { type AutoChoice, autoFinding, autoKeysIn, autoRequest, type ChooseAuto, withoutAuto, withValues } from "./auto.ts";
import { type Finding, hasErrors } from "./diagnostic.ts";
import { type JobFiles, readSource } from "./jobFiles.ts";
import { type ShapeFault, shapeFaultsIn } from "./shapeFaults.ts";
import { copy, deletePath, isObject, type Source, setPath, valueAt } from "./source.ts";

/** The result of readJob. */
export interface JobRead {
  readonly job?: Job;
  readonly source: Source;
  readonly findings: readonly Finding[];
  /** The values of the keys that the job leaves as `auto`. */
  readonly auto?: AutoChoice;
}

/** The peaks of jobs that were judged before. */
export interface KnownPeaks {
  /** Returns the peak of a job; undefined if it is not known. */
  get(job: Job): Peak | undefined;
  set(job: Job, peak: Peak): void;
}

/** A job needs a peak that is not known, or is known as a bound that does not suffice. */
class UnknownPeak extends Error {}

const unknownPeak = (): never => {
  throw new UnknownPeak();
};

/** Returns the result; undefined if it needs an unknown peak. */
function unlessUnknown<T>(make: () => T): T | undefined {
  try {
    return make();
  } catch (error) {
    if (error instanceof UnknownPeak) return undefined;
    throw error;
  }
}

/** What `readJobWith` needs of those that call it. */
export interface JobReaders {
  /** Loads the kernel generators. */
  readonly load: () => Promise<(device: Device) => Target>;
  /** The name of the target that `load` returns for all devices; without it, each device has its own. */
  readonly target?: string | undefined;
  readonly known?: KnownPeaks | undefined;
  readonly chooseAuto: ChooseAuto;
}

/**
 * Reads a job and applies all rules. The compiler is loaded only if the job needs peaks that are not known, and the kernel generators only if upper
 * bounds of these peaks do not suffice.
 */
export async function readJobWith(
  { load, target, known, chooseAuto }: JobReaders,
  ...of: Parameters<typeof readQuickly>
): Promise<JobRead> {
  const read = await resolved(readQuickly(...of), chooseAuto);
  const { job, source } = read;
  if (!job || !needsPrograms(job)) return read;
  const judged = (peakOf: PeakOf): JobRead => ({
    ...read,
    findings: [...read.findings, ...findingsOfMemory(job, source, peakOf)],
  });
  /** Returns a known peak; a bound only if it suffices. */
  const recalled = (of: Job, room = 0): Peak | undefined => {
    const peak = known?.get(of);
    return peak && (!peak.isBound || peak.bytes <= room) ? peak : undefined;
  };
  const kept = (of: Job, peak: Peak): Peak => {
    known?.set(of, peak);
    return peak;
  };
  const fromKnown = unlessUnknown(() => judged((of, room) => recalled(of, room) ?? unknownPeak()));
  if (fromKnown) return fromKnown;
  const { peakBound, peakOf } = await import("../rules/all.ts");
  const bounded = (of: Job, room: number): Peak => {
    const bound = peakBound(of, target);
    return bound.bytes <= room ? kept(of, bound) : unknownPeak();
  };
  const fromBounds = unlessUnknown(() =>
    judged((of, room) => recalled(of, room) ?? (room === undefined ? unknownPeak() : bounded(of, room))),
  );
  if (fromBounds) return fromBounds;
  const targetOf = await load();
  return judged((of, room) => recalled(of, room) ?? kept(of, peakOf(of, targetOf(of.cluster.device))));
}

/** Returns the job with the values that are chosen in place of `auto`. */
async function resolved(read: JobRead, chooseAuto: ChooseAuto): Promise<JobRead> {
  const { source, findings } = read;
  const keys = autoKeysIn(source);
  if (keys.length === 0 || hasErrors(findings)) return read;
  const given = parseKeys(withoutAuto(source, keys));
  if (!given.success) return read;
  const auto = await chooseAuto(autoRequest(completeJob(given.data), source, keys));
  if ("found" in auto) return { source, findings: [...findings, autoFinding(source, keys, auto)] };
  return { ...judged({ source: withValues(source, auto.values, new Set(Object.keys(auto.values))), findings }), auto };
}

/**
 * Reads a job and applies the rules that need no compiled program. A job that leaves keys as `auto` is read as far as its keys are right; rules see it
 * once values are chosen. `files`: how the files beside the job are found.
 */
export function readQuickly(text: string, file: string, sets: readonly string[], files?: JobFiles): JobRead {
  const read = readSource(text, file, sets, files);
  const keys = autoKeysIn(read.source);
  if (keys.length === 0 || hasErrors(read.findings)) return judged(read);
  const given = withoutAuto(read.source, keys);
  const { success, error } = parseKeys(given);
  return { source: read.source, findings: success ? read.findings : shapeFaultsIn(error.issues, given).map((s) => s.finding) };
}

/** Parses the keys of a source, and applies the rules that need no compiled program. */
function judged({ source, findings }: Pick<JobRead, "source" | "findings">): JobRead {
  if (hasErrors(findings)) return { source, findings };
  const read = parseKeys(source);
  if (!read.success) {
    const shape = shapeFaultsIn(read.error.issues, source);
    const repaired = repair(source, shape);
    // with the likely value in its place, the rules can check the job in the same run
    return { source, findings: [...shape.map((s) => s.finding), ...(repaired ? jobFindings(repaired.job, repaired.source) : [])] };
  }
  const job = completeJob(read.data);
  const reported = [...jobFindings(job, source), ...idleEntries(read.data.allow, source)];
  return hasErrors(reported) ? { source, findings: reported } : { job, source, findings: reported };
}

/**
 * Returns the keys of a job, or what is wrong with them. `null` over a value of another file is the value null where the key has such a value; otherwise it
 * removes the value, and the key has its default.
 */
function parseKeys(source: Source) {
  const read = JobText.safeParse(source.value);
  if (read.success) return read;
  const refused = read.error.issues.map(({ path }) => path.join("."));
  const removed = source.cleared.filter((path) => valueAt(source.value, path) === null && refused.includes(path.join(".")));
  if (removed.length === 0) return read;
  for (const path of removed) deletePath(source.value, path);
  return JobText.safeParse(source.value);
}

function repair(source: Source, shape: readonly ShapeFault[]): { job: Job; source: Source } | undefined {
  if (!isObject(source.value)) return undefined;
  const value = copy(source.value);
  for (const { meant } of shape) {
    if (!meant) return undefined;
    if (meant.instead) deletePath(value, meant.instead);
    const path = meant.path.split(".");
    if (meant.instead && valueAt(value, path) !== undefined) continue; // both names exist: the correct one has precedence
    if (setPath(value, path, meant.value)) return undefined;
  }
  const read = JobText.safeParse(value);
  return read.success ? { job: completeJob(read.data), source: { ...source, value } } : undefined;
}
