import type { Command } from "commander";
import { printFindings, readJobAt, shownFindings } from "./loadPlan.ts";
import { type CommonOptions, type ProcessExit, withExamples, withFormat, withSet } from "./options.ts";
import { printJson, printStdout } from "./output.ts";

/** Registers `check`: prints all findings of a job; exits with 1 if the job is invalid. */
export function registerCheck(program: Command, exit: ProcessExit): void {
  withExamples(
    withSet(withFormat(program.command("check").description("check a job and print all findings"))).argument(
      "<job>",
      "the job's YAML file",
    ),
    "check job.yaml",
    "check job.yaml --set parallel.tensor=4 --set parallel.sequence=true",
  ).action(async (path: string, options: CommonOptions) => {
    const { findings, job } = await readJobAt(path, options.set);
    const valid = job !== undefined;
    if (options.format === "json") printJson({ valid, ...(await shownFindings(findings)) });
    else {
      await printFindings(findings);
      if (valid) printStdout(`${path}: valid`);
    }
    if (!valid) exit.setCode(1);
  });
}
