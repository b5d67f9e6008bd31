/** Applies safe fixes to the text of a job, one after the other, until none is left. */
import type { Finding } from "./diagnostic.ts";
import { changedText } from "./keyEdits.ts";
import type { JobRead } from "./readJob.ts";
import { keysAt } from "./shapeFaults.ts";
import { valueAt } from "./source.ts";

/** A safe fix that was applied, and what it changed: `parallel.sequence: true`. */
export interface AppliedFix {
  readonly finding: Finding;
  readonly change: string;
}

/** A safe fix that was not applied, and why. */
export interface LeftFix extends AppliedFix {
  readonly why: string;
}

/** A job after its fixes. */
export interface FixedJob {
  readonly text: string;
  readonly read: JobRead;
  readonly applied: readonly AppliedFix[];
  readonly left: readonly LeftFix[];
}

/** Reads a text: `job` with the `--set` options of the command, `file` without them. */
export interface Readers {
  job(text: string): Promise<JobRead>;
  file(text: string): Promise<JobRead>;
}

/** Applies the safe fixes of a job. A fix is applied if its finding is then gone and no other has appeared, in the job and in the file alone. */
export async function fixJob(original: string, readers: Readers): Promise<FixedJob> {
  let state = await stateOf(original, readers);
  const applied: AppliedFix[] = [];
  const left = new Map<string, LeftFix>();
  for (;;) {
    const finding = state.read.findings.find((f) => f.isSafe && !left.has(identity(f)));
    if (!finding) return { text: state.text, read: state.read, applied, left: [...left.values()] };
    const result = await fixed(state, finding, readers);
    if (typeof result === "string") left.set(identity(finding), { finding, change: changeText(finding), why: result });
    else {
      applied.push({ finding, change: changeText(finding, result.read.source.value) });
      state = result;
    }
  }
}

interface State {
  readonly text: string;
  /** The job with `--set` options, and the file without them. */
  readonly read: JobRead;
  readonly inFile: JobRead;
}

async function stateOf(text: string, readers: Readers): Promise<State> {
  const read = await readers.job(text);
  return { text, read, inFile: await readers.file(text) };
}

/** Formats the change of a fix. A key that the fix leaves out is still written with its default, if it has a comment. */
function changeText({ set = {}, leftOut = [], renamed }: Finding, then?: unknown): string {
  if (renamed) return `${renamed.from.join(".")} renamed to ${renamed.to}`;
  const isLeftOut = (path: string): boolean => leftOut.includes(path) && valueAt(then, path.split(".")) === undefined;
  return Object.entries(set)
    .map(([path, value]) => (isLeftOut(path) ? `${path} left out` : `${path}: ${JSON.stringify(value)}`))
    .join(", ");
}

const identity = ({ code, path }: Finding): string => `${code} ${path}`;

/** Returns the state after a fix, or why the fix is not applied. */
async function fixed(before: State, finding: Finding, readers: Readers): Promise<State | string> {
  const paths = [finding.path, ...Object.keys(finding.set ?? {})];
  for (const path of paths) {
    const at = before.read.source.at(path);
    if (at && "set" in at) return `--set ${at.set} is not written in the file`;
    if (at && at.file !== before.read.source.file) return `the key stands in ${at.file}`;
  }
  const { renamed } = finding;
  const { value } = before.read.source;
  if (renamed && valueAt(value, renamed.to.split(".")) !== undefined) return `${renamed.to} is written, too`;
  const text = changedText(before.text, finding, keysAt);
  if (text === undefined) return "the place cannot be edited alone: its value is shared through an anchor, or a comment stands in it";
  const after = await stateOf(text, readers);
  if (after.read.findings.some((f) => identity(f) === identity(finding))) return "the finding would stay";
  const added = newFindings(before.read, after.read) ?? newFindings(before.inFile, after.inFile);
  return added ? `it would cause ${added.code}: ${added.found}` : after;
}

/** Returns the first finding that a change has caused. A finding of a check that an earlier error had prevented is none. */
function newFindings({ findings: old }: JobRead, { findings: now }: JobRead): Finding | undefined {
  const known = new Set(old.map(identity));
  const checked = old.some(isOfText) ? 0 : old.some(({ level }) => level === "error") ? 1 : 2;
  return now.find((f) => !known.has(identity(f)) && (isOfText(f) ? 0 : f.code === "C510" ? 2 : 1) <= checked);
}

/** Whether a finding is of the text and its keys: rules are applied to jobs without one. */
const isOfText = ({ code, level }: Finding): boolean => code.startsWith("S") && level === "error";
