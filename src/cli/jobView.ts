/** The job of a plan for the page of `view`: its text, and the line of each key that decides about an instruction or that a rule names. */
import { basename } from "node:path";
import type { Plan } from "../../schemas/plan.ts";
import type { JobView, KeyLine } from "../report/view/planView.ts";
import { type JobSource, jobSource, type Searched } from "./keyPlace.ts";

/** Returns the job file if it is found, else the complete job as YAML. `keys`: the paths whose lines the page shows. */
export async function jobView(plan: Plan, keys: readonly string[], searched: Searched): Promise<JobView> {
  const { valueAt } = await import("../frontend/source.ts");
  const found = await jobSource(plan, searched);
  const { text, source } = found ?? (await completeJobText(plan));
  const lineOf = (path: string): KeyLine | undefined => {
    if (valueAt(source.value, path.split(".")) === undefined) return { isDefault: true };
    const at = source.at(path);
    if (!at || "set" in at) return at;
    return at.file === source.file ? { line: at.line } : { elsewhere: `${at.file}:${at.line}: ${at.lineText.trim()}` };
  };
  const places = keys.flatMap((path) => {
    const line = lineOf(path);
    return line ? [[path, line] as const] : [];
  });
  return { text, ...(found ? { file: basename(source.file) } : {}), places: Object.fromEntries(places) };
}

async function completeJobText({ job }: Plan): Promise<JobSource> {
  const [{ stringify }, { readSource }] = await Promise.all([import("yaml"), import("../frontend/jobFiles.ts")]);
  const text = stringify(job, { aliasDuplicateObjects: false });
  return { text, source: readSource(text, "the complete job").source };
}
