import { type Command, Option } from "commander";
import { type BackendName, backendNames } from "../../runtime/backends.ts";
import { type CommonOptions, type ProcessExit, withExamples, withFormat } from "./options.ts";
import { printJson, printStdout } from "./output.ts";

interface DoctorOptions extends Pick<CommonOptions, "format"> {
  readonly backend?: BackendName;
}

/** Registers `doctor`: prints which backends work on this machine; exits with 3 if none does, or the one that `--backend` names does not. */
export function registerDoctor(program: Command, exit: ProcessExit): void {
  withExamples(
    withFormat(program.command("doctor").description("report which backends work on this machine, and how to install what is missing")),
    "doctor",
    "doctor --backend cuda && rankc run plan/",
  )
    .addOption(new Option("--backend <name>", "exit with 3 unless this backend works (default: unless any does)").choices(backendNames))
    .action(async ({ format, backend }: DoctorOptions) => {
      const [{ diagnose, printDiagnosis }, { nvccVersion }] = await Promise.all([
        import("../../runtime/doctor.ts"),
        import("../codegen/cubins.ts"),
      ]);
      const diagnosis = await diagnose({ nvcc: nvccVersion() });
      if (format === "json") printJson(diagnosis);
      else printStdout(printDiagnosis(diagnosis));
      const works = backend ? diagnosis.works[backend] : Object.values(diagnosis.works).some((all) => all);
      if (!works) exit.setCode(3);
    });
}
