/** What the command line says: data to stdout, all else to stderr. Characters that a terminal would act on are escaped. */
import { escaped, unprintable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";

export type Format = "text" | "json";

const ended = (text: string): string => (text.endsWith("\n") ? text : `${text}\n`);
export const printStdout = (text: string): void => void process.stdout.write(ended(escaped(text)));
export const printJson = (value: unknown): void => printStdout(JSON.stringify(value, null, 2).replace(unprintable, asJson));
/** JSON has escapes of its own, of four digits. */
const asJson = (c: string): string => (c === "\n" ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
export const printStderr = (text: string): void => tellStyled(escaped(text));
/** Text that holds colours, and in which nothing else is left to escape. */
export const tellStyled = (text: string): void => void process.stderr.write(ended(text));
/** A line that the next one replaces, where a person watches; else a line. */
export const printProgress = (line: string): void =>
  void process.stderr.write(process.stderr.isTTY ? `\r${escaped(line)}\u001b[K` : `${escaped(line)}\n`);
/** The last of them stays. */
export const endProgress = (): void => void (process.stderr.isTTY && process.stderr.write("\n"));

/** An error as people read it. */
export function printError(error: unknown): void {
  if (error instanceof Trouble) {
    printStderr(`rankc: ${error.message}${error.fix ? `\n  fix: ${error.fix}` : ""}`);
    return;
  }
  const text = error instanceof Error ? error.message : String(error);
  printStderr(`rankc: internal error: ${text.split("\n")[0]}\n  this is a bug in rankc; RANKC_DEBUG=1 shows where`);
  if (process.env.RANKC_DEBUG && error instanceof Error) printStderr(error.stack ?? "");
}
