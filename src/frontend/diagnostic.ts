/**
 * Findings: errors and warnings of a job, with code, place, reason and fix. All findings are collected. Errors around a job, such as a
 * missing file, are a Trouble and stop the command.
 */
import pc from "picocolors";
import { escaped, unprintable } from "../../schemas/printable.ts";

/** A place in a file. Lines and columns start at 1; endCol is one past the last character. */
export interface SourceLocation {
  readonly file: string;
  readonly line: number;
  readonly col: number;
  readonly endCol: number;
  readonly lineText: string;
}
/** The place of a finding: in the file, or in a `--set` option. */
export type At = SourceLocation | { readonly set: string };
/** A place with what stands there. */
export type Related = At & { readonly label?: string };

/** Key paths and new values of a fix, as for `--set`. */
export type Changes = Readonly<Record<string, unknown>>;

/** One error or warning of `check`. */
export interface Finding {
  readonly code: string;
  readonly level: "error" | "warning";
  readonly title: string;
  readonly path: string;
  readonly found: string;
  readonly why: string;
  readonly fix: string;
  /** A tested fix: these changes remove the finding and cause no new error. */
  readonly set?: Changes;
  /** The keys of `set` that the fix removes from the text, because they get their default values. */
  readonly leftOut?: readonly string[];
  /** A fix that gives a key another name, or moves it to another section. */
  readonly renamed?: { readonly from: readonly (string | number)[]; readonly to: string };
  /** Whether `check --fix` applies the fix. */
  readonly isSafe?: true;
  readonly at?: Related;
  readonly related?: readonly Related[];
}

/** Returns whether any finding is an error. */
export const hasErrors = (findings: readonly Finding[]): boolean => findings.some((f) => f.level === "error");

/** Formats changes as `--set` options. */
export const setText = (set: Changes): string =>
  Object.entries(set)
    .map(([path, value]) => `${path}: ${Array.isArray(value) ? `[${value.join(", ")}]` : String(value)}`)
    .join(", ");

/** The columns of findings where no narrower terminal shows them. */
export const WIDTH = 100;

/** How findings are shown. */
export interface Look {
  readonly color: boolean;
  /** The most columns of a line. Default: `WIDTH`. */
  readonly width?: number | undefined;
}
/** The maximum number of printed findings; the others are counted. */
export const SHOWN = 50;

/** The first findings, and counts of the others. */
export interface Shown {
  readonly findings: readonly Finding[];
  /** The number of omitted findings by code. */
  readonly more: Readonly<Record<string, number>>;
}

/** Returns the first findings, and the number of omitted ones by code. */
export function shown(unsorted: readonly Finding[]): Shown {
  const all = byLine(unsorted);
  const more: Record<string, number> = {};
  for (const { code } of all.slice(SHOWN)) more[code] = (more[code] ?? 0) + 1;
  return { findings: all.slice(0, SHOWN), more };
}

/** Returns findings by file, in the order of their first findings, and by line; those of `--set` and without a place come first. */
function byLine(findings: readonly Finding[]): Finding[] {
  const file = ({ at }: Finding): string => (at && !("set" in at) ? at.file : "");
  const files = ["", ...new Set(findings.map(file))];
  const line = ({ at }: Finding): number => (at && !("set" in at) ? at.line : 0);
  return findings.toSorted((a, b) => files.indexOf(file(a)) - files.indexOf(file(b)) || line(a) - line(b));
}

/** Formats the first findings in the style of rustc, the number of omitted ones by code, and the total. */
export function renderFindings(all: readonly Finding[], look: Look): string {
  if (!all.length) return "";
  const { findings, more } = shown(all);
  const left = Object.entries(more).map(([code, n]) => `${n} x ${code}`);
  const others = left.length ? `… and ${all.length - findings.length} more: ${left.join(", ")}\n\n` : "";
  return `${findings.map((f) => renderFinding(f, look)).join("\n\n")}\n\n${others}${countByLevel(all)}\n`;
}

/** Formats a finding: its title, its places with their lines, and notes. */
export function renderFinding(f: Finding, { color, width = WIDTH }: Look): string {
  const paint = pc.createColors(color);
  const head = f.level === "error" ? paint.red : paint.yellow;
  const places = [...(f.at ? [f.at] : []), ...(f.related ?? [])];
  const gutter = Math.max(1, ...places.map((at) => ("set" in at ? 1 : String(at.line).length)));
  const pad = " ".repeat(gutter);
  const frame = (at: Related, i: number): string[] => {
    if ("set" in at) return [`${pad}${paint.cyan(i ? ":::" : "-->")} --set ${printable(at.set)}`];
    const { text, from, to } = window(at, width < WIDTH ? width - gutter - 5 : WIDTH);
    const bar = paint.cyan("|");
    const label = printable(at.label ?? "");
    // a label that does not fit behind the marks is below them, flush right
    const isBelow = width < WIDTH && gutter + 5 + to + label.length > width;
    const shown = label === "" || isBelow ? "" : `  ${paint.cyan(label)}`;
    const below = wrap(label, width - gutter - 3).map(
      (l) => `${pad} ${bar} ${" ".repeat(Math.max(0, Math.min(from, width - gutter - 3 - l.length)))}${paint.cyan(l)}`,
    );
    return [
      `${pad}${paint.cyan(i ? ":::" : "-->")} ${escaped(at.file)}:${at.line}:${at.col}`,
      `${pad} ${bar}`,
      `${paint.cyan(String(at.line).padStart(gutter))} ${bar} ${text}`,
      `${pad} ${bar} ${" ".repeat(from)}${(i ? paint.cyan : head)((i ? "-" : "^").repeat(to - from))}${shown}`,
      ...(isBelow ? below : []),
    ];
  };
  const note = (word: string, text: string) => {
    const [first = "", ...rest] = wrap(printable(text), width - gutter - 10);
    return [
      `${pad} ${paint.cyan("=")} ${paint.bold(`${word}:`)}${" ".repeat(6 - word.length)}${first}`,
      ...rest.map((l) => `${pad}   ${" ".repeat(7)}${l}`),
    ];
  };
  const code = `${f.level}[${f.code}]`;
  const [title = "", ...titles] = wrap(f.title, width - code.length - 2);
  return [
    `${head(paint.bold(code))}${paint.bold(`: ${title}`)}`,
    ...titles.map((more) => paint.bold(`  ${more}`)),
    ...places.flatMap(frame),
    ...note("found", f.found),
    ...note("why", f.why),
    ...note("fix", f.fix),
  ].join("\n");
}

function countByLevel(findings: readonly Finding[]): string {
  const part = (level: Finding["level"]) => {
    const n = findings.filter((f) => f.level === level).length;
    return n ? [`${n} ${level}${n > 1 ? "s" : ""}`] : [];
  };
  return [...part("error"), ...part("warning")].join(", ");
}

/** Replaces control characters, and keeps the columns that carets point at. */
const printable = (text: string): string => text.replace(unprintable, (c) => (c === "\t" ? " " : "\ufffd"));

/** Returns the part of a line around the caret that has about `room` columns. */
function window({ lineText, col, endCol }: SourceLocation, room: number): { text: string; from: number; to: number } {
  const start = col - 1 > room - 20 ? col - 1 - 30 : 0;
  const cut = lineText.slice(start, start + room);
  const lead = start ? "…" : "";
  const text = printable(lead + cut) + (start + room < lineText.length ? "…" : "");
  const from = col - 1 - start + lead.length;
  return { text, from, to: Math.max(from + 1, Math.min(endCol - 1 - start + lead.length, text.length)) };
}

/** Breaks a text between words. */
export function wrap(text: string, width: number): string[] {
  const lines: string[] = [];
  let line = "";
  for (const word of text.split(" ")) {
    if (line && line.length + 1 + word.length > width) {
      lines.push(line);
      line = word;
    } else line = line ? `${line} ${word}` : word;
  }
  return [...lines, line];
}
