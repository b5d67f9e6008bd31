/** `compile --check`: whether the files of a compiled plan are those that the job gives. */
import { existsSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { printReport, printStdout, reportWidth } from "./output.ts";

/** Compares the files of a folder with those that the compiler gives. Prints what is stale, and returns whether all are current. Throws a Trouble if the folder has none of them. */
export async function isCurrent(folder: string, plan: Plan, files: Readonly<Record<string, string>>): Promise<boolean> {
  const found = Object.keys(files).filter((name) => isFile(join(folder, name)));
  const committed = found.filter((name) => name === "plan.json" || name === "plan.txt");
  if (committed.length === 0)
    throw new Trouble(`${folder} has no plan.json and no plan.txt to check`, "compile the job without --check first, and commit the plan");
  // a folder with plan.json alone, or with plan.txt alone, has no kernels beside it
  const wanted = committed.includes("plan.json")
    ? Object.keys(files).filter((name) => name !== "plan.txt" || found.includes(name))
    : ["plan.txt"];
  const stale: string[] = [];
  let isShown = false;
  for (const name of wanted) {
    const now = found.includes(name) ? readFileSync(join(folder, name), "utf8") : undefined;
    if (now === files[name]) continue;
    if (name === "plan.json" && now !== undefined) {
      const changed = await showDifference(now, join(folder, name), plan);
      if (!changed) continue;
      isShown = true;
    }
    stale.push(name);
  }
  if (stale.length === 0) {
    printStdout(`${folder} is current: ${committed.join(" and ")} are those of the job`);
    return true;
  }
  if (!isShown && stale.includes("plan.txt"))
    printStdout(firstDifference(readFileSync(join(folder, "plan.txt"), "utf8"), files["plan.txt"] ?? ""));
  printStdout(
    `${folder} is stale: ${stale.slice(0, 5).join(", ")}${stale.length > 5 ? ` and ${stale.length - 5} more` : ""}; compile the job again and commit it`,
  );
  return false;
}

const isFile = (path: string): boolean => existsSync(path) && statSync(path).isFile();

/** Prints the difference of a plan file to the compiled plan. Returns whether there is one: cubins that nvcc added are none. */
async function showDifference(text: string, file: string, plan: Plan): Promise<boolean> {
  const [{ parsePlan }, { diffPlans }, { printDiff }] = await Promise.all([
    import("../plan/read.ts"),
    import("../report/diff.ts"),
    import("../report/diffText.ts"),
  ]);
  try {
    const diff = diffPlans(parsePlan(text, file), plan);
    if (diff.changes) printReport(printDiff(diff, { width: reportWidth(), isWhole: false }));
    return diff.changes;
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    printStdout(error.message);
    return true;
  }
}

function firstDifference(before: string, after: string): string {
  const [old, now] = [before.split("\n"), after.split("\n")];
  const at = now.findIndex((line, i) => line !== old[i]);
  const line = at < 0 ? now.length : at;
  return `plan.txt differs from line ${line + 1} on:\n  - ${old[line]?.trim() ?? "(the end)"}\n  + ${now[line]?.trim() ?? "(the end)"}`;
}
