/** Applies all rules to a job. Each finding gets its place and, if a candidate change works, a tested fix. */
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import type { Changes, Finding } from "../frontend/diagnostic.ts";
import { setText } from "../frontend/diagnostic.ts";
import { copy, isObject, type Source, setPath, valueAt } from "../frontend/source.ts";
import { memoryRule, type Peak } from "./memory.ts";
import { quick } from "./quick.ts";
import type { Rule, RuleResult } from "./rule.ts";

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
  const budget = { left: WORK };
  return quick.flatMap((rule) => findingsOf(rule, job, source, budget));
}

/** Returns the findings of the memory rule for a job without errors. `peakOf` returns the highest peak of a job. */
export const findingsOfMemory = (job: Job, source: Source, peakOf: (job: Job) => Peak): Finding[] =>
  findingsOf(memoryRule(peakOf), job, source, { left: WORK });

const findingsOf = (rule: Rule, job: Job, source: Source, budget: { left: number }): Finding[] =>
  [...rule.check(job)].map((result): Finding => {
    const set = firstCure(rule, result, job, source, budget);
    const at = source.at(result.at);
    const related = (result.related ?? []).flatMap((path) => (isWritten(source, path) ? (source.at(path) ?? []) : []));
    return {
      code: rule.code,
      level: rule.level,
      title: rule.title,
      path: result.at,
      found: result.found,
      why: rule.why,
      fix: set ? `${setText(set)} (${result.fix})` : result.fix,
      ...(set && { set }),
      ...(at && { at }),
      ...(related.length && { related }),
    };
  });

const isWritten = (source: Source, path: string): boolean => valueAt(source.value, path.split(".")) !== undefined;

/** Returns the first candidate change that removes the finding and causes no other. */
function firstCure(rule: Rule, result: RuleResult, job: Job, source: Source, budget: { left: number }): Changes | undefined {
  const before = new Set(reportedCodes(job));
  let [left, compiled] = [TRIES, COMPILED];
  for (const set of result.tries ?? []) {
    if (left-- <= 0 || budget.left <= 0) return undefined;
    budget.left -= source.size + 10 * job.model.layers;
    const then = changed(source, set);
    if (!then) continue;
    const after = reportedCodes(then);
    if (!after.every((v) => before.has(v)) || after.includes(`${rule.code} ${result.at}`)) continue;
    if (rule.holds) {
      if (compiled-- <= 0) return undefined;
      if (!rule.holds(then)) continue;
    }
    return set;
  }
  return undefined;
}

const reportedCodes = (job: Job): string[] => quick.flatMap((r) => [...r.check(job)].map((result) => `${r.code} ${result.at}`));

function changed(source: Source, set: Changes): Job | undefined {
  if (!isObject(source.value)) return undefined;
  const value = copy(source.value);
  for (const [path, v] of Object.entries(set)) if (setPath(value, path.split("."), v)) return undefined;
  const text = JobText.safeParse(value);
  return text.success ? completeJob(text.data) : undefined;
}
