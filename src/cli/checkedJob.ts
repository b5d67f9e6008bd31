/** Checks a job for `check`: its findings, its safe fixes, and the plan that is committed beside it. */
import { Trouble } from "../../schemas/trouble.ts";
import type { Finding } from "../frontend/diagnostic.ts";
import type { FixedJob } from "../frontend/fixJob.ts";
import type { JobRead } from "../frontend/readJob.ts";
import type { PlanComparison } from "./checkPlan.ts";
import { jobTextAt, readJobText } from "./loadPlan.ts";
import { asWritten, type JobOptions } from "./options.ts";

/** What is asked of a job. */
export interface JobQuestions extends JobOptions {
  readonly strict?: true;
  readonly fix?: true;
  readonly plans?: true;
}

/** A job that was checked. `read`, `findings`: after its fixes. */
export interface CheckedJob {
  readonly path: string;
  readonly text: string;
  readonly read: JobRead;
  readonly findings: readonly Finding[];
  readonly isValid: boolean;
  readonly fixed?: FixedJob;
  readonly compared?: PlanComparison;
}

/** Checks a job. Throws a Trouble if it cannot be read. */
export async function checkedJob(path: string, options: JobQuestions): Promise<CheckedJob> {
  if (options.fix && path.startsWith("git:"))
    throw new Trouble(`${path} is of a revision, which --fix cannot change`, "check the revision out, and name the file");
  const text = await jobTextAt(path);
  const fixed = options.fix && (await fixedJob(path, text, options));
  const read = fixed ? fixed.read : await readJobText(text, path, options);
  const compared = options.plans && (await comparedPlan(path, read));
  const isTooStrict = options.strict && read.findings.some(({ level }) => level === "warning");
  const isValid = read.job !== undefined && !isTooStrict;
  return { path, text, read, findings: read.findings, isValid, ...(fixed && { fixed }), ...(compared && { compared }) };
}

async function fixedJob(path: string, text: string, { set, overlay }: JobOptions): Promise<FixedJob> {
  const { fixJob } = await import("../frontend/fixJob.ts");
  const job = (of: string) => readJobText(of, path, { set, overlay });
  const isChanged = set.length + overlay.length > 0;
  return fixJob(text, { job, file: isChanged ? (of) => readJobText(of, path, asWritten) : job });
}

async function comparedPlan(path: string, { job }: JobRead): Promise<PlanComparison | undefined> {
  const { committedFolder, comparePlan } = await import("./checkPlan.ts");
  if (job === undefined) return undefined;
  const folder = committedFolder(path);
  return folder === undefined ? undefined : comparePlan(folder, job);
}

/** Returns whether a fix has changed the text. */
export const isChanged = ({ text, fixed }: CheckedJob): boolean => fixed !== undefined && fixed.text !== text;

/** Writes the fixed files, all or none. Throws a Trouble if one is read-only, or was changed meanwhile. */
export async function writeFixed(jobs: readonly CheckedJob[]): Promise<void> {
  const changes = jobs.filter(isChanged);
  if (changes.length === 0) return;
  const { expectWritable, writeFiles } = await import("./outputFiles.ts");
  for (const { path, text } of changes) {
    expectWritable(path);
    if ((await jobTextAt(path)) !== text)
      throw new Trouble(`${path} was changed while it was checked; no file is written`, "run check --fix again");
  }
  writeFiles(changes.map(({ path, fixed }) => [path, fixed?.text ?? ""]));
}
