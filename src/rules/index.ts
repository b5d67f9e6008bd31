/** Applies all rules to a job. Each finding gets its place and, if a candidate change works, a tested fix. */
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import type { Changes, Finding, Related } from "../frontend/diagnostic.ts";
import { setText } from "../frontend/diagnostic.ts";
import { copy, deletePath, isObject, type Source, setPath, valueAt } from "../frontend/source.ts";
import { jobRules } from "./jobRules.ts";
import { memoryRule, type PeakOf } from "./memory.ts";
import type { JobPath, Rule, RuleResult } from "./rule.ts";

/** The smallest valid job, into which the example of each rule is merged. */
export const smallest = `
name: smallest
model: {layers: 4, hidden: 16, ffn: 48, heads: 4, kv_heads: 4, vocab: 768, seq: 48}
parallel: {world: 1}
train: {steps: 10, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`;

/** Limit of candidate changes per finding. Each costs one pass of all rules, below a millisecond for a typical job. */
const TRIES = 100;
/** Limit of candidate changes per finding that need compiled programs. */
const COMPILED = 5;
/** Budget of all candidate changes of a job, in copied characters and layers. */
const WORK = 4e6;

/** Returns the findings of the rules that need no compiled program. */
export function jobFindings(job: Job, source: Source): Finding[] {
  const report: Report = { left: WORK, taken: {}, cured: new Set() };
  return allowedAmong(
    source,
    jobRules.flatMap((rule) => findingsOf(rule, job, source, report)),
  );
}

/** Returns the findings of the memory rule for a job without errors. `peakOf` returns the highest peak of a job. */
export const findingsOfMemory = (job: Job, source: Source, peakOf: PeakOf): Finding[] =>
  allowedAmong(source, findingsOf(memoryRule(peakOf), job, source, { left: WORK, taken: {}, cured: new Set() }));

/** Returns the findings without the warnings that the job allows. */
const allowedAmong = (source: Source, findings: readonly Finding[]): Finding[] => {
  const allow = valueAt(source.value, ["allow"]);
  const codes = new Set(Array.isArray(allow) ? allow.map((entry: unknown) => (isObject(entry) ? entry.code : entry)) : []);
  return findings.filter(({ code, level }) => level === "error" || !codes.has(code));
};

/** The findings of one report: the budget of candidate changes, and the changes of the fixes so far. */
interface Report {
  left: number;
  taken: Changes;
  /** The findings, by code and place, that those changes remove. */
  readonly cured: Set<string>;
}

const findingsOf = (rule: Rule, job: Job, source: Source, report: Report): Finding[] =>
  [...rule.check(job)].map((result): Finding => {
    const cure = firstCure(rule, result, job, source, report);
    const set = cure?.set;
    if (set) {
      report.taken = { ...report.taken, ...set };
      report.cured.add(`${rule.code} ${result.at}`);
    }
    const at = placeOf(result.at, job, source);
    const related = (result.related ?? []).flatMap((path) => secondPlace(path, job, source, at));
    return {
      code: rule.code,
      level: rule.level,
      title: rule.title,
      path: result.at,
      found: result.found,
      why: rule.why,
      fix: set ? `${setText(set)} (${result.fix})` : result.fix,
      ...cure,
      ...(at && { at }),
      ...(related.length && { related }),
    };
  });

/** A tested fix. */
type Cure = Pick<Finding, "leftOut" | "isSafe"> & { readonly set: Changes };

/** Returns the place of a key; if it is not written, that of its section, with the value that it has as the label. */
function placeOf(path: string, job: Job, source: Source): Related | undefined {
  const at = source.at(path);
  const keys = path.split(".");
  if (!at || "set" in at || valueAt(source.value, keys) !== undefined) return at;
  const value = valueAt(job, keys);
  const isPlain = value !== undefined && (typeof value !== "object" || value === null);
  return { ...at, label: `${path} is not written${isPlain ? `: ${value}` : ""}` };
}

/** Returns a second place; none for a key that is not written, if the first place is on the line of its section, or if that is not written either. */
function secondPlace(path: JobPath, job: Job, source: Source, at: Related | undefined): Related[] {
  const place = placeOf(path, job, source);
  if (!place) return [];
  if (place.label === undefined) return [{ ...place, label: path }];
  const isSeen = at && "line" in at && "line" in place && at.line === place.line;
  return isSeen || valueAt(source.value, path.split(".").slice(0, 1)) === undefined ? [] : [place];
}

/**
 * Returns the first candidate change that removes the finding and causes no other, alone and together with the fixes of earlier findings. Fixes of
 * one report thus never contradict each other.
 */
function firstCure(rule: Rule, result: RuleResult, job: Job, source: Source, report: Report): Cure | undefined {
  const before = new Set(reportedCodes(job));
  let [left, compiled] = [TRIES, COMPILED];
  const agrees = (set: Changes): boolean => {
    const together = changed(source, { ...report.taken, ...set });
    // a finding that an earlier fix removes stays removed
    const isOpen = (v: string): boolean => before.has(v) && !report.cured.has(v) && v !== `${rule.code} ${result.at}`;
    return together !== undefined && reportedCodes(together).every(isOpen);
  };
  const safe = result.safe && valuesOf(result.safe, source);
  for (const cure of [...(safe ? [safe] : []), ...triesOf(result)]) {
    const { set } = cure;
    if (left-- <= 0 || report.left <= 0) return undefined;
    report.left -= source.size + 10 * job.model.layers;
    if (Object.entries(set).some(([path, value]) => path in report.taken && String(report.taken[path]) !== String(value))) continue;
    const then = changed(source, set);
    if (!then) continue;
    const after = reportedCodes(then);
    if (!after.every((v) => before.has(v)) || after.includes(`${rule.code} ${result.at}`)) continue;
    if (Object.keys(report.taken).length > 0 && !agrees(set)) continue;
    if (rule.holds) {
      if (compiled-- <= 0) return undefined;
      if (!rule.holds(then)) continue;
    }
    return cure;
  }
  return undefined;
}

function* triesOf({ tries = [] }: RuleResult): Generator<Cure> {
  for (const set of tries) yield { set };
}

/** Returns a safe change with the values that keys get when they are left out; undefined if the job is then incomplete. */
function valuesOf(safe: Changes, source: Source): Cure | undefined {
  const leftOut = Object.keys(safe).filter((path) => safe[path] === undefined);
  if (leftOut.length === 0) return { set: safe, isSafe: true };
  const then = changed(source, safe);
  if (!then) return undefined;
  const value = (path: string): unknown => safe[path] ?? valueAt(then, path.split(".")) ?? null;
  return { set: Object.fromEntries(Object.keys(safe).map((path) => [path, value(path)])), leftOut, isSafe: true };
}

const reportedCodes = (job: Job): string[] => jobRules.flatMap((r) => [...r.check(job)].map((result) => `${r.code} ${result.at}`));

function changed(source: Source, set: Changes): Job | undefined {
  if (!isObject(source.value)) return undefined;
  const value = copy(source.value);
  for (const [path, v] of Object.entries(set)) {
    if (v === undefined) deletePath(value, path.split("."));
    else if (setPath(value, path.split("."), v)) return undefined;
  }
  const text = JobText.safeParse(value);
  return text.success ? completeJob(text.data) : undefined;
}
