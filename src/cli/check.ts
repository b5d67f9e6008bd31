import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { printFindings, readJobAt, shownFindings } from "./loadPlan.ts";
import { type CommonOptions, type ProcessExit, withExamples, withFormat, withSet } from "./options.ts";
import { printJson, printStdout } from "./output.ts";

interface CheckOptions extends CommonOptions {
  readonly strict?: true;
  readonly print?: true;
  readonly defaults?: true;
}

/** Registers `check`: prints all findings of a job; exits with 1 if the job is invalid, or with `--strict` if it has warnings. */
export function registerCheck(program: Command, exit: ProcessExit): void {
  withExamples(
    withSet(withFormat(program.command("check").description("check a job and print all findings")))
      .option("--strict", "count warnings as errors")
      .option("--print", "print the job with the files that it extends, -f and --set, and where each value comes from")
      .option("--defaults", "with --print: also keys that have their defaults")
      .argument("<job>", "the job's YAML file"),
    "check job.yaml",
    "check job.yaml --set parallel.tensor=4 --set parallel.sequence=true",
    "check job.yaml --strict",
    "check job.yaml -f h200.yaml --print",
  ).action(async (path: string, options: CheckOptions) => {
    if (options.defaults && !options.print) throw new Trouble("--defaults needs --print", "add --print");
    const { findings, job, source } = await readJobAt(path, options);
    const warnings = findings.filter(({ level }) => level === "warning").length;
    const isTooStrict = options.strict === true && warnings > 0;
    const valid = job !== undefined && !isTooStrict;
    const resolved =
      options.print && source.value !== undefined
        ? (await import("../frontend/resolvedJob.ts")).resolvedJob(source, options.defaults ? job : undefined)
        : undefined;
    if (options.format === "json") {
      const { value: keys, origins } = resolved ?? {};
      printJson({ valid, ...(await shownFindings(findings)), ...(resolved && { resolved: { job: keys, origins } }) });
    } else {
      await printFindings(findings);
      if (resolved) printStdout(resolved.text());
      else if (valid) printStdout(`${path}: valid`);
      else if (job !== undefined)
        printStdout(
          `${path}: ${warnings} warning${warnings > 1 ? "s" : ""}, which --strict counts as errors; allow accepts one with a reason`,
        );
    }
    if (!valid) exit.setCode(1);
  });
}
