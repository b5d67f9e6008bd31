/** Finds the line of a job file that holds a key of a plan's job, and which rules refuse a changed job. */
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { Source } from "../frontend/source.ts";
import type { KeyPlace } from "../report/whyText.ts";
import { jobCandidates, planFile } from "./loadPlan.ts";
import { asWritten, type JobOptions } from "./options.ts";

/** What a command names: where the job file of a plan is looked for, and how a job is read. */
export interface Searched {
  /** The plan or job that the command names. */
  readonly path: string;
  /** The job file that the user names. */
  readonly job?: string | undefined;
  readonly options: JobOptions;
}

/** The job file of a plan: its text, and the place of its keys. */
export interface JobSource {
  readonly text: string;
  readonly source: Source;
}

/**
 * Returns where a key is written: in the named job, in the job that was compiled, or in a file that gives the same job, beside the plan, in the
 * folder above or in the folder that the plan remembers.
 */
export async function keyPlace(plan: Plan, path: string, searched: Searched): Promise<KeyPlace> {
  const found = await jobSource(plan, searched);
  return found ? placeIn(found.source, path) : { path };
}

/** Returns the file of the job of a plan; undefined if no candidate gives the same job. Throws a Trouble if the named one does not. */
export async function jobSource(plan: Plan, { path: shown, job, options }: Searched): Promise<JobSource | undefined> {
  const file = planFile(shown);
  const candidates = job !== undefined ? [job] : file === undefined ? [shown] : jobCandidates(file);
  for (const candidate of candidates) {
    const found = await sourceOf(candidate, plan, file === undefined ? options : asWritten, job !== undefined);
    if (found) return found;
  }
  return undefined;
}

async function sourceOf(file: string, plan: Plan, { set, overlay }: JobOptions, isNamed: boolean): Promise<JobSource | undefined> {
  const [{ jobFiles }, { readQuickly }, { sha256 }, { canonical }] = await Promise.all([
    import("./jobFiles.ts"),
    import("../frontend/readJob.ts"),
    import("../plan/seal.ts"),
    import("../plan/canonical.ts"),
  ]);
  const files = jobFiles(overlay);
  try {
    const text = files.read(file);
    const { job, source } = readQuickly(text, file, set, files);
    if (job !== undefined && sha256(canonical(job)) === plan.digests.job) return { text, source };
    if (isNamed)
      throw new Trouble(`${file} is not the job of the plan`, "name the job that the plan was compiled from, with the same keys");
    return undefined;
  } catch (error) {
    if (isNamed || !(error instanceof Trouble)) throw error;
    return undefined;
  }
}

async function placeIn(source: Source, path: string): Promise<KeyPlace> {
  const { valueAt } = await import("../frontend/source.ts");
  if (valueAt(source.value, path.split(".")) === undefined) return { path, isDefault: true };
  const at = source.at(path);
  if (!at) return { path };
  return { path, line: "set" in at ? `--set ${at.set}` : `${at.file}:${at.line}: ${at.lineText.trim()}` };
}

/** Returns per change the codes of the rules that refuse the changed job; empty if none does. */
export async function refusalsOf(job: Job, changes: readonly { readonly set: Readonly<Record<string, unknown>> }[]): Promise<string[]> {
  const [{ jobRules }, { completeJob, JobText }, { setPath }] = await Promise.all([
    import("../rules/jobRules.ts"),
    import("../../schemas/job.ts"),
    import("../frontend/source.ts"),
  ]);
  return changes.map(({ set }) => {
    // derived keys follow from the others
    const value: Record<string, unknown> = structuredClone({ ...job, parallel: { ...job.parallel, data: undefined } });
    for (const [path, to] of Object.entries(set)) setPath(value, path.split("."), to);
    const read = JobText.safeParse(value);
    if (!read.success) return "another type of value";
    const then = completeJob(read.data);
    return [...new Set(jobRules.flatMap((rule) => (rule.level === "error" && [...rule.check(then)].length > 0 ? [rule.code] : [])))].join(
      ", ",
    );
  });
}
