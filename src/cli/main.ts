/** The process of the command line: runs the command that its arguments name (commandLine.ts), and ends with its exit code. */
import { unwritten } from "../../schemas/writing.ts";
import { runCommandLine } from "./commandLine.ts";
import { printError } from "./output.ts";

// a reader such as `head` may close the pipe: that is not an error
for (const stream of [process.stdout, process.stderr]) {
  stream.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code === "EPIPE") process.exit(process.exitCode ?? 0);
    // if stderr itself fails, nothing can be printed
    if (stream === process.stdout) printError(unwritten("the standard output", error));
    process.exit(2);
  });
}

void runCommandLine(process.argv.slice(2), {
  setCode: (code) => {
    process.exitCode = code;
  },
  exitSoon: (end) => {
    process.once("exit", end);
    setTimeout(() => process.exit(), 5000).unref();
  },
});
