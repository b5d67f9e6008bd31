/**
 * The commands and their errors. A caller passes how the exit code is set: main.ts sets that of the process, a test reads it.
 * Exit codes. 0: success. 1: the job is invalid, or the plans differ. 2: an error. 3: this machine cannot run the plan.
 * A command imports its modules when it runs, so that `check` and `compile` start fast.
 */
import { Command, CommanderError } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { readPackageFile } from "../packageFile.ts";
import { registerCalibrate } from "./calibrate.ts";
import { registerCheck } from "./check.ts";
import { registerCompile } from "./compile.ts";
import { registerData } from "./data.ts";
import { registerDiff } from "./diff.ts";
import { registerDoctor } from "./doctor.ts";
import { registerEval } from "./eval.ts";
import { registerExamples } from "./examples.ts";
import { registerExplain } from "./explain.ts";
import { registerExport } from "./export.ts";
import { registerGit } from "./git.ts";
import { registerImport } from "./import.ts";
import { registerInit } from "./init.ts";
import { registerInspect } from "./inspect.ts";
import { InvalidJob } from "./loadPlan.ts";
import { registerLsp } from "./lsp.ts";
import type { ProcessExit } from "./options.ts";
import { printError } from "./output.ts";
import { registerPack } from "./pack.ts";
import { parserError } from "./parserErrors.ts";
import { registerRun } from "./run.ts";
import { registerSchema } from "./schema.ts";
import { registerSearch } from "./search.ts";
import { registerServe } from "./serve.ts";
import { registerView } from "./view.ts";

/** The commands by name, in the order of the help text. */
const commands: Readonly<Record<string, (program: Command, exit: ProcessExit) => void>> = {
  init: registerInit,
  check: registerCheck,
  compile: registerCompile,
  inspect: registerInspect,
  diff: registerDiff,
  view: registerView,
  search: registerSearch,
  run: registerRun,
  eval: registerEval,
  data: registerData,
  pack: registerPack,
  serve: registerServe,
  explain: registerExplain,
  examples: registerExamples,
  import: registerImport,
  export: registerExport,
  "git-setup": registerGit,
  "git-driver": registerGit,
  calibrate: registerCalibrate,
  doctor: registerDoctor,
  schema: registerSchema,
  lsp: registerLsp,
};

/** Returns what registers the command that arguments name; of all commands, which takes 7 ms, if they name none. */
function namedBy([name = ""]: readonly string[]): Iterable<(typeof commands)[string]> {
  const one = Object.hasOwn(commands, name) ? commands[name] : undefined;
  return one ? [one] : new Set(Object.values(commands));
}

/** Runs one command with these arguments: those after the name of the program. Prints errors; throws none. */
export async function runCommandLine(args: readonly string[], exit: ProcessExit): Promise<void> {
  const program = new Command("rankc")
    .description("Compiles a training job written in YAML into one execution plan for all ranks, and runs it.")
    .version(JSON.parse(readPackageFile("package.json")).version)
    .exitOverride()
    .configureOutput({ outputError: (text, write) => write(parserError(text)) })
    .showSuggestionAfterError();
  for (const register of namedBy(args)) register(program, exit);
  await program.parseAsync(args, { from: "user" }).catch((error: unknown) => exit.setCode(codeOf(error)));
}

/** Prints an error that has no message of its own yet, and returns the exit code. */
function codeOf(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
  if (error instanceof InvalidJob) return 1;
  printError(error);
  return error instanceof Trouble ? error.exit : 2;
}
