/** Options and help text that several commands share. */
import { type Command, InvalidArgumentError, Option } from "commander";
import { targetNames } from "../codegen/targetNames.ts";
import type { Format } from "./output.ts";

/** What the command line changes in a job. */
export interface JobOptions {
  readonly set: readonly string[];
  /** Files that are laid over the job. */
  readonly overlay: readonly string[];
}

/** No change. */
export const asWritten: JobOptions = { set: [], overlay: [] };

/** Options of most commands. */
export interface CommonOptions extends JobOptions {
  readonly format: Format;
}

/** How a command ends the process. The process is passed in, so that only main.ts changes its state. */
export interface ProcessExit {
  /** Sets the exit code; the process ends when the command is done. */
  setCode(code: number): void;
  /** Waits up to 5 s for output to flush, then exits through `end(code)`. */
  exitSoon(end: (code: number) => void): void;
}

/** Adds `--format text|json`, or with other formats. */
export const withFormat = (command: Command, formats: readonly string[] = ["text", "json"]): Command =>
  command.addOption(new Option("--format <format>", "the output format").choices(formats).default("text"));

/** Adds the repeatable `--set path=value` and `-f overlay.yaml`. */
export const withSet = (command: Command): Command =>
  command
    .option("--set <path=value>", "override a key of the job (repeatable)", collect, [])
    .option("-f, --overlay <file>", "lay the keys of a file over the job, before --set (repeatable)", collect, []);

/** Adds `--target`. */
export const withTarget = (command: Command): Command =>
  command.option("--target <target>", `the backend to generate kernels for: ${targetNames.join(", ")}`);

/** Appends example lines, without `rankc`, to the help text. */
export const withExamples = (command: Command, ...lines: string[]): Command =>
  command.addHelpText("after", `\nExamples:\n${lines.map((line) => `  $ rankc ${line}`).join("\n")}`);

/** Description of the argument of commands that take a plan or a job. */
export const planOrJob = "a plan (its directory or plan.json), or a job";

/** Description of `--data-dir` for commands that read the corpus. */
export const dataDirHelp = "the base directory of data.path and data.labels (default: the directory of the job, which a plan remembers)";

/** Parser of a repeatable option: appends the value to the list. */
export function collect(value: string, all: readonly string[]): string[] {
  return [...all, value];
}

/** Parses an integer from 0 to 999,999,999. Throws InvalidArgumentError. */
export function wholeNumber(text: string): number {
  if (!/^\d{1,9}$/.test(text)) throw new InvalidArgumentError("It is not a whole number.");
  return Number(text);
}

/** Parses an integer from 1 to 999,999,999. Throws InvalidArgumentError. */
export function atLeastOne(text: string): number {
  if (/^-\d{1,9}$/.test(text) || wholeNumber(text) === 0) throw new InvalidArgumentError("It must be at least 1.");
  return Number(text);
}

/** Steps from the first to the last. */
export type StepRange = readonly [first: number, last: number];

/** Returns whether a step is in a range. */
export const isIn = (ranges: readonly StepRange[], step: number): boolean => ranges.some(([first, last]) => first <= step && step <= last);

/** Parses a list of steps and ranges of steps: 100-110,250. Throws InvalidArgumentError. */
export function stepRanges(text: string): StepRange[] {
  return text.split(",").map((part) => {
    const [, first, last] = /^(\d{1,9})(?:-(\d{1,9}))?$/.exec(part.trim()) ?? [];
    const range: StepRange = [Number(first), Number(last ?? first)];
    if (first === undefined || range[0] < 1 || range[1] < range[0])
      throw new InvalidArgumentError("It is not a list of steps and ranges of steps, such as 100-110,250.");
    return range;
  });
}
