/**
 * What a person is told about a job: a Finding, collected with all others, placed, and with a way out.
 * What is wrong around the job (a missing file, a directory) is a Trouble and stops the command.
 */
import pc from "picocolors";
import { escaped, unprintable } from "../../schemas/printable.ts";

/** A place in a file: 1-based, endCol is one past the last character. */
export interface SourceLocation {
  readonly file: string;
  readonly line: number;
  readonly col: number;
  readonly endCol: number;
  readonly lineText: string;
}
export type At = SourceLocation | { readonly set: string };

/** Key paths and their new values: the fix in a form that `--set` understands. */
export type Changes = Readonly<Record<string, unknown>>;

export interface Finding {
  readonly code: string;
  readonly level: "error" | "warning";
  readonly title: string;
  readonly path: string;
  readonly found: string;
  readonly why: string;
  readonly fix: string;
  /** Present when it has been tried: with these changes the finding goes away and no new error comes. */
  readonly set?: Changes;
  readonly at?: At;
  readonly related?: readonly At[];
}

export const hasErrors = (findings: readonly Finding[]): boolean => findings.some((f) => f.level === "error");

export const setText = (set: Changes): string =>
  Object.entries(set)
    .map(([path, value]) => `${path}: ${Array.isArray(value) ? `[${value.join(", ")}]` : String(value)}`)
    .join(", ");

const WIDTH = 100;
/** Findings that are shown; of the others there is a count. */
export const SHOWN = 50;

export interface Shown {
  readonly findings: readonly Finding[];
  /** By code, how many more there are. */
  readonly more: Readonly<Record<string, number>>;
}

/** The first findings, and how many of each code are left out. */
export function shown(all: readonly Finding[]): Shown {
  const more: Record<string, number> = {};
  for (const { code } of all.slice(SHOWN)) more[code] = (more[code] ?? 0) + 1;
  return { findings: all.slice(0, SHOWN), more };
}

/** The first findings as text, as rustc would print them, a count of the others by code, and one line that counts all. */
export function renderFindings(all: readonly Finding[], { color }: { readonly color: boolean }): string {
  if (!all.length) return "";
  const { findings, more } = shown(all);
  const left = Object.entries(more).map(([code, n]) => `${n} x ${code}`);
  const paint = pc.createColors(color);
  const one = (f: Finding): string => {
    const head = f.level === "error" ? paint.red : paint.yellow;
    const places = [...(f.at ? [f.at] : []), ...(f.related ?? [])];
    const gutter = Math.max(1, ...places.map((at) => ("set" in at ? 1 : String(at.line).length)));
    const pad = " ".repeat(gutter);
    const frame = (at: At, i: number): string[] => {
      if ("set" in at) return [`${pad}${paint.cyan(i ? ":::" : "-->")} --set ${printable(at.set)}`];
      const { text, from, to } = window(at);
      const bar = paint.cyan("|");
      return [
        `${pad}${paint.cyan(i ? ":::" : "-->")} ${escaped(at.file)}:${at.line}:${at.col}`,
        `${pad} ${bar}`,
        `${paint.cyan(String(at.line).padStart(gutter))} ${bar} ${text}`,
        `${pad} ${bar} ${" ".repeat(from)}${(i ? paint.cyan : head)((i ? "-" : "^").repeat(to - from))}`,
      ];
    };
    const note = (word: string, text: string) => {
      const [first = "", ...rest] = wrap(printable(text), WIDTH - gutter - 10);
      return [
        `${pad} ${paint.cyan("=")} ${paint.bold(`${word}:`)}${" ".repeat(6 - word.length)}${first}`,
        ...rest.map((l) => `${pad}   ${" ".repeat(7)}${l}`),
      ];
    };
    return [
      `${head(paint.bold(`${f.level}[${f.code}]`))}${paint.bold(`: ${f.title}`)}`,
      ...places.flatMap(frame),
      ...note("found", f.found),
      ...note("why", f.why),
      ...note("fix", f.fix),
    ].join("\n");
  };
  const others = left.length ? `… and ${all.length - findings.length} more: ${left.join(", ")}\n\n` : "";
  return `${findings.map(one).join("\n\n")}\n\n${others}${countByLevel(all)}\n`;
}

function countByLevel(findings: readonly Finding[]): string {
  const part = (level: Finding["level"]) => {
    const n = findings.filter((f) => f.level === level).length;
    return n ? [`${n} ${level}${n > 1 ? "s" : ""}`] : [];
  };
  return [...part("error"), ...part("warning")].join(", ");
}

/** Each character keeps its column, which carets point at. */
const printable = (text: string): string => text.replace(unprintable, (c) => (c === "\t" ? " " : "\ufffd"));

/** The part of a long line that the caret points into. */
function window({ lineText, col, endCol }: SourceLocation): { text: string; from: number; to: number } {
  const start = col - 1 > WIDTH - 20 ? col - 1 - 30 : 0;
  const cut = lineText.slice(start, start + WIDTH);
  const lead = start ? "…" : "";
  const text = printable(lead + cut) + (start + WIDTH < lineText.length ? "…" : "");
  const from = col - 1 - start + lead.length;
  return { text, from, to: Math.max(from + 1, Math.min(endCol - 1 - start + lead.length, text.length)) };
}

function wrap(text: string, width: number): string[] {
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
