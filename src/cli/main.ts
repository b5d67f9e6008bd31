#!/usr/bin/env node
/**
 * The command line: registers the commands and sets the exit code. Data goes to stdout, all other text to stderr (output.ts).
 * Exit codes. 0: success. 1: the job is invalid, or the plans differ. 2: an error. 3: this machine cannot run the plan.
 * A command imports its modules when it runs, so that `check` and `compile` start fast.
 */
import { Command, CommanderError } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { unwritten } from "../../schemas/writing.ts";
import { readPackageFile } from "../packageFile.ts";
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
import { registerInspect } from "./inspect.ts";
import { InvalidJob } from "./loadPlan.ts";
import type { ProcessExit } from "./options.ts";
import { printError } from "./output.ts";
import { registerPack } from "./pack.ts";
import { parserError } from "./parserErrors.ts";
import { registerRun } from "./run.ts";
import { registerSchema } from "./schema.ts";
import { registerServe } from "./serve.ts";

const exit: ProcessExit = {
  setCode: (code) => {
    process.exitCode = code;
  },
  exitSoon: (end) => {
    process.once("exit", end);
    setTimeout(() => process.exit(), 5000).unref();
  },
};

/** The commands, in the order of the help text. */
const commands: readonly ((program: Command, exit: ProcessExit) => void)[] = [
  registerCheck,
  registerCompile,
  registerInspect,
  registerDiff,
  registerRun,
  registerEval,
  registerData,
  registerPack,
  registerServe,
  registerExplain,
  registerExamples,
  registerImport,
  registerExport,
  registerGit,
  registerDoctor,
  registerSchema,
];

/** Maps every error to a message and an exit code. */
function fail(error: unknown): void {
  if (error instanceof CommanderError) {
    process.exitCode = error.exitCode === 0 ? 0 : 2;
  } else if (error instanceof InvalidJob) {
    process.exitCode = 1;
  } else {
    printError(error);
    process.exitCode = error instanceof Trouble ? error.exit : 2;
  }
}

// a reader such as `head` may close the pipe: that is not an error
for (const stream of [process.stdout, process.stderr]) {
  stream.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code === "EPIPE") process.exit(process.exitCode ?? 0);
    // if stderr itself fails, nothing can be printed
    if (stream === process.stdout) printError(unwritten("the standard output", error));
    process.exit(2);
  });
}

const program = new Command("rankc")
  .description("Compiles a training job written in YAML into one execution plan for all ranks, and runs it.")
  .version(JSON.parse(readPackageFile("package.json")).version)
  .exitOverride()
  .configureOutput({ outputError: (text, write) => write(parserError(text)) })
  .showSuggestionAfterError();
for (const register of commands) register(program, exit);
await program.parseAsync().catch(fail);
