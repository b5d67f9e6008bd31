/** Findings as data for other programs: places with line, column and end, and fixes as edits of the text. */
import { type At, type Finding, type Related, renderFinding } from "./diagnostic.ts";
import { changedText, editBetween } from "./keyEdits.ts";
import { keysAt } from "./shapeFaults.ts";

/** A region of a file. Lines and columns start at 1; columns count UTF-16 code units; the end is one past the last character. */
export interface Region {
  readonly file: string;
  readonly line: number;
  readonly column: number;
  readonly end_line: number;
  readonly end_column: number;
}

/** A place of a finding: a region of a file, or a `--set` option. */
export type FindingSpan = (Region | { readonly set: string }) & { readonly is_primary: boolean; readonly label?: string };

/** A fix. `edits` are missing if it concerns a `--set` option, or a value that other keys share. */
export interface Suggestion {
  readonly is_safe: boolean;
  readonly set?: Finding["set"];
  readonly left_out?: readonly string[];
  readonly renamed?: { readonly from: string; readonly to: string };
  readonly edits?: readonly (Region & { readonly text: string })[];
}

/** A finding for other programs. */
export interface FindingJson extends Pick<Finding, "code" | "level" | "title" | "path" | "found" | "why" | "fix"> {
  readonly spans: readonly FindingSpan[];
  readonly suggestion?: Suggestion;
  /** The finding as the text format prints it. */
  readonly rendered: string;
}

/** The texts of files by their names. */
export type Texts = ReadonlyMap<string, string>;

/** Returns a finding for other programs. */
export function findingJson(finding: Finding, texts: Texts): FindingJson {
  const { code, level, title, path, found, why, fix, at, related = [] } = finding;
  const suggestion = suggestionOf(finding, texts);
  return {
    ...{ code, level, title, path, found, why, fix },
    spans: [...(at ? [spanOf(at, true)] : []), ...related.map((place) => spanOf(place, false))],
    ...(suggestion && { suggestion }),
    rendered: renderFinding(finding, { color: false }),
  };
}

function spanOf(at: At | Related, is_primary: boolean): FindingSpan {
  const label = "label" in at && at.label !== undefined ? { label: at.label } : {};
  if ("set" in at) return { set: at.set, is_primary, ...label };
  const { file, line, col, endCol } = at;
  return { file, line, column: col, end_line: line, end_column: endCol, is_primary, ...label };
}

function suggestionOf(finding: Finding, texts: Texts): Suggestion | undefined {
  const { set, leftOut, renamed, isSafe = false, at } = finding;
  if (!set && !renamed) return undefined;
  const text = at && "file" in at ? texts.get(at.file) : undefined;
  const changed = text === undefined ? undefined : changedText(text, finding, keysAt);
  return {
    is_safe: isSafe,
    ...(set && { set }),
    ...(leftOut && { left_out: leftOut }),
    ...(renamed && { renamed: { from: renamed.from.join("."), to: renamed.to } }),
    ...(at && "file" in at && text !== undefined && changed !== undefined && { edits: [regionOf(at.file, text, changed)] }),
  };
}

function regionOf(file: string, before: string, after: string): Region & { text: string } {
  const { from, to, text } = editBetween(before, after);
  const [start, end] = [placeOf(before, from), placeOf(before, to)];
  return { file, line: start.line, column: start.column, end_line: end.line, end_column: end.column, text };
}

function placeOf(text: string, offset: number): { line: number; column: number } {
  const before = text.slice(0, offset);
  return { line: before.split("\n").length, column: offset - before.lastIndexOf("\n") };
}
