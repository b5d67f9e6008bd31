/** Finds the line of a job file that holds a key of a plan's job, and which rules refuse a changed job. */
import { dirname, join } from "node:path";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { KeyPlace } from "../report/whyText.ts";
import { planFile } from "./loadPlan.ts";
import { asWritten, type JobOptions } from "./options.ts";

interface Searched {
  /** The plan or job that the command names. */
  readonly path: string;
  /** The job file that the user names. */
  readonly job?: string | undefined;
  readonly options: JobOptions;
}

/** Returns where a key is written: in the named job, in the job that was compiled, or in a job.yaml beside the plan or in the folder above that gives the same job. */
export async function keyPlace(plan: Plan, path: string, { path: shown, job, options }: Searched): Promise<KeyPlace> {
  const file = planFile(shown);
  const candidates =
    job !== undefined ? [job] : file === undefined ? [shown] : [join(dirname(file), "job.yaml"), join(dirname(file), "..", "job.yaml")];
  for (const candidate of candidates) {
    const place = await placeIn(candidate, plan, path, file === undefined ? options : asWritten, job !== undefined);
    if (place) return place;
  }
  return { path };
}

async function placeIn(
  file: string,
  plan: Plan,
  path: string,
  { set, overlay }: JobOptions,
  isNamed: boolean,
): Promise<KeyPlace | undefined> {
  const [{ jobFiles }, { readQuickly }, { valueAt }, { sha256 }, { canonical }] = await Promise.all([
    import("./jobFiles.ts"),
    import("../frontend/readJob.ts"),
    import("../frontend/source.ts"),
    import("../plan/seal.ts"),
    import("../plan/canonical.ts"),
  ]);
  const files = jobFiles(overlay);
  try {
    const { job, source } = readQuickly(files.read(file), file, set, files);
    const isSame = job !== undefined && sha256(canonical(job)) === plan.digests.job;
    if (!isSame && isNamed)
      throw new Trouble(`${file} is not the job of the plan`, "name the job that the plan was compiled from, with the same keys");
    if (!isSame) return undefined;
    const isWritten = valueAt(source.value, path.split(".")) !== undefined;
    if (!isWritten) return { path, isDefault: true };
    const at = source.at(path);
    if (!at) return { path };
    return { path, line: "set" in at ? `--set ${at.set}` : `${at.file}:${at.line}: ${at.lineText.trim()}` };
  } catch (error) {
    if (isNamed || !(error instanceof Trouble)) throw error;
    return undefined;
  }
}

/** Returns per change the codes of the rules that refuse the changed job; empty if none does. */
export async function refusalsOf(job: Job, changes: readonly { readonly set: Readonly<Record<string, unknown>> }[]): Promise<string[]> {
  const [{ quick }, { completeJob, JobText }, { setPath }] = await Promise.all([
    import("../rules/quick.ts"),
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
    return [...new Set(quick.flatMap((rule) => (rule.level === "error" && [...rule.check(then)].length > 0 ? [rule.code] : [])))].join(
      ", ",
    );
  });
}
