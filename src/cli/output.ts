/** Prints the command line's output: data to stdout, all other text to stderr. Escapes control characters that a terminal would obey. */
import { escaped, unprintable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { paint } from "../report/textLayout.ts";

/** A value of `--format`. */
export type Format = "text" | "json";

const withNewline = (text: string): string => (text.endsWith("\n") ? text : `${text}\n`);

/** Prints data to stdout, with a final newline. */
export const printStdout = (text: string): void => void process.stdout.write(withNewline(escaped(text)));

/** Prints a report with style marks to stdout, in color on a terminal. */
export const printReport = (text: string): void => void process.stdout.write(paint(withNewline(escaped(text)), showsColor(process.stdout)));

/** Returns the columns of a report: COLUMNS, else those of the terminal, else 80; at least 72. */
export function reportWidth(): number {
  const asked = Number(process.env.COLUMNS);
  const columns = Number.isInteger(asked) && asked > 0 ? asked : process.stdout.isTTY ? process.stdout.columns : 80;
  return Math.max(72, Math.min(columns, 240));
}

/** Returns the columns of a narrow terminal that shows stderr; undefined for others. */
export function narrowTerminal(): number | undefined {
  const { isTTY, columns } = process.stderr;
  return isTTY && columns < 100 ? Math.max(60, columns) : undefined;
}

/** Prints a value to stdout as indented JSON. */
export const printJson = (value: unknown): void => printStdout(JSON.stringify(value, null, 2).replace(unprintable, jsonEscape));

const jsonEscape = (c: string): string => (c === "\n" ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** Prints a message to stderr, with a final newline. */
export const printStderr = (text: string): void => printStyled(escaped(text));

/** Prints text with color codes to stderr. The caller has escaped all other control characters. */
export const printStyled = (text: string): void => void process.stderr.write(withNewline(text));

/** Returns whether stderr shows colors: it is a terminal, and neither NO_COLOR nor TERM=dumb is set. */
export const hasColor = (): boolean => showsColor(process.stderr);
const showsColor = ({ isTTY }: { readonly isTTY?: boolean }): boolean =>
  Boolean(isTTY) && !process.env.NO_COLOR && process.env.TERM !== "dumb";

/** Returns whether progress goes to a terminal. */
export const isTerminal = (): boolean => Boolean(process.stderr.isTTY);

/** The columns of the terminal. */
export const terminalColumns = (): number => process.stderr.columns || 80;

/** Lines of the frame on the terminal. */
let shownLines = 0;

/** Prints a frame to the terminal, in place of the one before it. */
export function printFrame(lines: readonly string[]): void {
  const up = shownLines > 0 ? `\u001b[${shownLines}A` : "";
  // a shorter frame clears what is left of a longer one
  process.stderr.write(`${up}${lines.map((line) => `\r${escaped(line)}\u001b[K\n`).join("")}\u001b[J`);
  shownLines = lines.length;
}

/** Prints a progress line to stderr. On a terminal the next progress line overwrites it. */
export const printProgress = (line: string): void =>
  void process.stderr.write(process.stderr.isTTY ? `\r${escaped(line)}\u001b[K` : `${escaped(line)}\n`);

/** Seconds between two progress lines: on a terminal one overwrites the other, in a log each stays. */
export const progressInterval = (): number => (process.stderr.isTTY ? 0.2 : 10);

/** Returns a function that prints a progress line, unless another was printed within the interval between two. */
export function occasionalProgress(): (line: string) => void {
  let next = 0;
  return (line) => {
    if (performance.now() < next) return;
    printProgress(line);
    next = performance.now() + 1000 * progressInterval();
  };
}

/** Ends the current progress line, so that it stays visible. */
export const endProgress = (): void => void (process.stderr.isTTY && process.stderr.write("\n"));

/** Returns the level of RANKC_DEBUG: 0 off, 1 pass timings and stacks, 2 also what each pass changed. Other values count as 1. */
export function debugLevel(): 0 | 1 | 2 {
  const value = process.env.RANKC_DEBUG ?? "";
  return value === "" || value === "0" ? 0 : value === "2" ? 2 : 1;
}

/** Prints a user error with its fix, or an internal error; with RANKC_DEBUG also the stack of the latter. */
export function printError(error: unknown): void {
  if (error instanceof Trouble) {
    printStderr(`rankc: ${error.message}${error.fix ? `\n  fix: ${error.fix}` : ""}`);
    return;
  }
  const text = error instanceof Error ? error.message : String(error);
  printStderr(`rankc: internal error: ${text.split("\n")[0]}\n  this is a bug in rankc; RANKC_DEBUG=1 shows where`);
  if (debugLevel() > 0 && error instanceof Error) printStderr(error.stack ?? "");
}
