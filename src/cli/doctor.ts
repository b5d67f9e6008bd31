import type { Command } from "commander";
import { type CommonOptions, type ProcessExit, withExamples, withFormat } from "./options.ts";
import { printJson, printStdout } from "./output.ts";

/** Registers `doctor`: prints which backends work on this machine; exits with 3 if something is missing. */
export function registerDoctor(program: Command, exit: ProcessExit): void {
  withExamples(
    withFormat(program.command("doctor").description("report which backends work on this machine, and how to install what is missing")),
    "doctor",
  ).action(async (options: Pick<CommonOptions, "format">) => {
    const [{ diagnose, printDiagnosis }, { nvccVersion }] = await Promise.all([
      import("../../runtime/doctor.ts"),
      import("../codegen/cubins.ts"),
    ]);
    const diagnosis = await diagnose({ nvcc: nvccVersion() });
    if (options.format === "json") printJson(diagnosis);
    else printStdout(printDiagnosis(diagnosis));
    if (diagnosis.verdict !== "ready") exit.setCode(3);
  });
}
