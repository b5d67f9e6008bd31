/** `compile --check` and `check --plans`: whether the files of a committed plan are those that the job gives. */
import { existsSync, readFileSync, statSync } from "node:fs";
import { basename, dirname, extname, join } from "node:path";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { targetNames } from "../codegen/targetNames.ts";
import type { Finding } from "../frontend/diagnostic.ts";
import { compileJob } from "./loadPlan.ts";
import { printReport, printStdout, reportWidth } from "./output.ts";

/** A committed plan beside the one that the compiler gives. */
export interface PlanComparison {
  readonly folder: string;
  /** The files of the plan that the folder has. */
  readonly committed: readonly string[];
  /** The files that are missing or not those of the job. */
  readonly stale: readonly string[];
  /** What differs, as a report; and in one line. */
  readonly report: string;
  readonly summary: string;
}

/** Returns the folder of the plan that is committed for a job: for job.yaml its own folder or plan/ in it, for NAME.yaml NAME/; undefined if there is none. */
export function committedFolder(job: string): string | undefined {
  const name = basename(job, extname(job));
  const folders = name === "job" ? [dirname(job), join(dirname(job), "plan")] : [join(dirname(job), name)];
  return folders.find((folder) => planFiles.some((file) => isFile(join(folder, file))));
}

const planFiles = ["plan.json", "plan.txt"] as const;
const isFile = (path: string): boolean => existsSync(path) && statSync(path).isFile();

/** Compiles a job for a target (default: that of the committed plan) and compares. Throws a Trouble if the folder has no plan. */
export async function comparePlan(folder: string, job: Job, named?: string): Promise<PlanComparison> {
  const committed = planFiles.filter((name) => isFile(join(folder, name)));
  if (committed.length === 0)
    throw new Trouble(`${folder} has no plan.json and no plan.txt to check`, "compile the job without --check first, and commit the plan");
  const texts = new Map(committed.map((name) => [name, readFileSync(join(folder, name), "utf8")]));
  const { plan, sources } = await compileJob(job, named ?? targetIn(texts.get("plan.json"), texts.get("plan.txt")));
  const [{ printPlan }, { printPlanText }] = await Promise.all([import("../plan/seal.ts"), import("../report/planText.ts")]);
  const kernels = [...sources].map(([file, text]) => [join("kernels", file), text] as const);
  const files: Readonly<Record<string, string>> = {
    ...{ "plan.json": printPlan(plan), "plan.txt": printPlanText(plan) },
    ...Object.fromEntries(kernels),
  };
  // a folder with plan.json alone, or with plan.txt alone, has no kernels beside it
  const wanted = texts.has("plan.json") ? Object.keys(files).filter((name) => name !== "plan.txt" || texts.has(name)) : ["plan.txt"];
  const changed = wanted.filter((name) => !isFile(join(folder, name)) || readFileSync(join(folder, name), "utf8") !== files[name]);
  const before = texts.get("plan.json");
  const inPlan =
    changed.includes("plan.json") && before !== undefined ? await planDifference(before, join(folder, "plan.json"), plan) : undefined;
  // cubins that nvcc added to a plan.json are no difference
  const stale = inPlan?.report === "" ? changed.filter((name) => name !== "plan.json") : changed;
  const inText = stale.includes("plan.txt") ? firstDifference(texts.get("plan.txt") ?? "", files["plan.txt"] ?? "") : undefined;
  const difference = inPlan?.report ? inPlan : inText;
  return { folder, committed, stale, report: difference?.report ?? "", summary: difference?.summary ?? `${stale.join(", ")} differ` };
}

/** Returns the target for which a plan was compiled; `cpu` if its files do not say one. */
function targetIn(plan: string | undefined, text: string | undefined): string {
  const named = /"target":\s*"([^"]+)"/.exec(plan ?? "")?.[1] ?? /, target (\S+)$/m.exec(text?.slice(0, 1000) ?? "")?.[1];
  return named !== undefined && targetNames.includes(named) ? named : "cpu";
}

/** Prints a comparison. Returns whether the plan is current. */
export function printComparison({ folder, committed, stale, report }: PlanComparison): boolean {
  if (stale.length === 0) {
    printStdout(`${folder} is current: ${committed.join(" and ")} ${committed.length > 1 ? "are those" : "is that"} of the job`);
    return true;
  }
  if (report !== "") printReport(report);
  printStdout(`${folder} is stale: ${namesOf(stale)}; compile the job again and commit it`);
  return false;
}

const namesOf = (stale: readonly string[]): string =>
  `${stale.slice(0, 5).join(", ")}${stale.length > 5 ? ` and ${stale.length - 5} more` : ""}`;

/** Returns the finding of a stale plan; undefined if the plan is current. */
export function staleFinding({ folder, committed, stale, summary }: PlanComparison, job: string): Finding | undefined {
  if (stale.length === 0) return undefined;
  const file = join(folder, stale.find((name) => committed.some((one) => one === name)) ?? committed[0] ?? "plan.json");
  return {
    code: "stale-plan",
    level: "error",
    title: "the committed plan is not that of the job",
    path: "",
    found: `${namesOf(stale)}: ${summary}`,
    why: "A committed plan shows in review what a change of the job costs, and a run of it is the run that was reviewed.",
    fix: `rankc compile ${job} -o ${folder}, and commit the plan`,
    at: { file, line: 1, col: 1, endCol: 2, lineText: "" },
  };
}

interface Difference {
  readonly report: string;
  readonly summary: string;
}

/** Returns the difference of a plan file to the compiled plan; empty where there is none. */
async function planDifference(text: string, file: string, plan: Plan): Promise<Difference> {
  const [{ parsePlan }, { diffPlans }, { printDiff }] = await Promise.all([
    import("../plan/read.ts"),
    import("../report/diff.ts"),
    import("../report/diffText.ts"),
  ]);
  try {
    const diff = diffPlans(parsePlan(text, file), plan);
    if (!diff.changes) return { report: "", summary: "" };
    const keys = diff.job.map(({ path }) => path).slice(0, 5);
    const [first] = diff.consequences;
    const summary = [...(keys.length > 0 ? [`other values of ${keys.join(", ")}`] : []), ...(first ? [first.text] : [])].join("; ");
    return { report: printDiff(diff, { width: reportWidth(), isWhole: false }), summary: summary || "the programs differ" };
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    return { report: error.message, summary: error.message };
  }
}

function firstDifference(before: string, after: string): Difference {
  const [old, now] = [before.split("\n"), after.split("\n")];
  // the first line has the digest, which differs whenever another line does
  const at = now.findIndex((line, i) => i > 0 && line !== old[i]);
  const line = at > 0 ? at : now[0] === old[0] ? now.length : 0;
  const [was, is] = [old[line]?.trim() ?? "(the end)", now[line]?.trim() ?? "(the end)"];
  return {
    report: `plan.txt differs from line ${line + 1} on:\n  - ${was}\n  + ${is}`,
    summary: `line ${line + 1} is "${was}", and "${is}" in the plan of the job`,
  };
}
