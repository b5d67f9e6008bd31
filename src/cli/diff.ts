import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { InvalidJob, type LoadedPlan, loadPlan, planFile } from "./loadPlan.ts";
import { type CommonOptions, type ProcessExit, withExamples, withFormat, withSet } from "./options.ts";
import { printJson, printStdout } from "./output.ts";

/** Registers `diff`: prints the differences of two plans; exits with 1 if they differ. */
export function registerDiff(program: Command, exit: ProcessExit): void {
  withExamples(
    withSet(
      withFormat(program.command("diff").description("compare two plans or jobs: job keys, summary, instructions; exit 1 if they differ")),
    )
      .argument("<a>", "a plan or a job")
      .argument("<b>", "a plan or a job"),
    "diff plan-a/ plan-b/",
    "diff plan/ job.yaml",
  ).action(async (a: string, b: string, options: CommonOptions) => {
    const [before, after] = await bothPlans(a, b, options.set);
    const { diffPlans, printDiff } = await import("../report/diff.ts");
    const diff = diffPlans(before.plan, after.plan);
    if (options.format === "json") printJson(diff);
    else printStdout(printDiff(diff));
    if (diff.changes) exit.setCode(1);
  });
}

/** Loads both sides; `--set` applies to the jobs among them. An invalid job is a Trouble, because exit code 1 means that the plans differ. */
async function bothPlans(a: string, b: string, sets: readonly string[]): Promise<[LoadedPlan, LoadedPlan]> {
  try {
    const setsOf = (path: string): readonly string[] => (planFile(path) && !(planFile(a) && planFile(b)) ? [] : sets);
    return [await loadPlan(a, setsOf(a)), await loadPlan(b, setsOf(b))];
  } catch (error) {
    throw error instanceof InvalidJob ? new Trouble("diff needs valid jobs", "fix the findings above; rankc check prints them too") : error;
  }
}
