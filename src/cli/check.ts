import type { Command } from "commander";
import { printFindings, readJobAt, shownFindings } from "./loadPlan.ts";
import { type CommonOptions, type ProcessExit, withExamples, withFormat, withSet } from "./options.ts";
import { printJson, printStdout } from "./output.ts";

interface CheckOptions extends CommonOptions {
  readonly strict?: true;
}

/** Registers `check`: prints all findings of a job; exits with 1 if the job is invalid, or with `--strict` if it has warnings. */
export function registerCheck(program: Command, exit: ProcessExit): void {
  withExamples(
    withSet(withFormat(program.command("check").description("check a job and print all findings")))
      .option("--strict", "count warnings as errors")
      .argument("<job>", "the job's YAML file"),
    "check job.yaml",
    "check job.yaml --set parallel.tensor=4 --set parallel.sequence=true",
    "check job.yaml --strict",
  ).action(async (path: string, options: CheckOptions) => {
    const { findings, job } = await readJobAt(path, options.set);
    const warnings = findings.filter(({ level }) => level === "warning").length;
    const isTooStrict = options.strict === true && warnings > 0;
    const valid = job !== undefined && !isTooStrict;
    if (options.format === "json") printJson({ valid, ...(await shownFindings(findings)) });
    else {
      await printFindings(findings);
      if (valid) printStdout(`${path}: valid`);
      else if (job !== undefined)
        printStdout(
          `${path}: ${warnings} warning${warnings > 1 ? "s" : ""}, which --strict counts as errors; allow accepts one with a reason`,
        );
    }
    if (!valid) exit.setCode(1);
  });
}
