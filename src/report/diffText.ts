/** Text of the differences of two plans: consequences first, each level cut so that an ordinary change fits one screen. */
import { printable } from "../../schemas/printable.ts";
import { bytesText, countText, flopsText, plural, ranges, secondsText } from "../units.ts";
import type { Consequence } from "./consequences.ts";
import type { FieldChange, PlanDiff, SummaryChange } from "./diff.ts";
import { axisTitle } from "./overview.ts";
import { placedText } from "./placementChanges.ts";
import type { ProgramChange } from "./programChanges.ts";
import { added, bold, type Column, dim, fitLines, fitTable, pad, warn, wrap } from "./textLayout.ts";

/** How a text shows differences. */
export interface DiffTextOptions {
  readonly width: number;
  /** Whether one level was asked for: it is not cut. */
  readonly isWhole: boolean;
}

/** Rows of each level in a text that shows all levels. */
const ROWS = { job: 6, consequences: 10, placement: 6, summary: 6, program: 3 } as const;

/** Formats the differences as text. */
export function printDiff(diff: PlanDiff, { width, isWhole }: DiffTextOptions = { width: 100, isWhole: false }): string {
  if (!diff.changes) return "the plans are the same\n";
  const most = (level: keyof typeof ROWS): number => (isWhole ? Number.POSITIVE_INFINITY : ROWS[level]);
  const cut = <T>(rows: readonly T[], level: keyof typeof ROWS, lines: (shown: readonly T[]) => string[], more: string): string[] => {
    const shown = rows.slice(0, most(level));
    const left = rows.length - shown.length;
    return rows.length === 0
      ? []
      : [...lines(shown), ...(left > 0 ? [dim(`  … ${countText(left)} more: ${more}`)] : []), ...(level === "job" ? [] : [""])];
  };
  const [a, b] = diff.names.map((name) => printable(name, 40));
  const { digests } = diff;
  const names =
    a === b
      ? `${bold(a ?? "")}  ${digests[0].slice(0, 16)} -> ${digests[1].slice(0, 16)}`
      : `${bold(a ?? "")} ${digests[0].slice(0, 12)} -> ${bold(b ?? "")} ${digests[1].slice(0, 12)}`;
  return [
    ...wrap(names, width),
    ...cut(diff.job, "job", (rows) => jobLines(rows, width), "--only job"),
    ...cut(
      diff.consequences,
      "consequences",
      (rows) => [bold("consequences, the gravest first"), ...rows.flatMap((c) => consequenceLines(c, width))],
      "--only summary",
    ),
    ...cut(diff.placement, "placement", (rows) => placementLines(rows, width), "--only placement"),
    ...cut(sortedSummary(diff.summary, isWhole), "summary", (rows) => summaryLines(rows, width), "--only summary"),
    ...(diff.program.length > 0 ? fitLines([programHead(diff.program)], width) : []),
    ...cut(sortedProgram(diff.program), "program", (rows) => rows.flatMap((row) => programLines(row, width, isWhole)), "--only program"),
  ]
    .join("\n")
    .replace(/\n+$/, "\n");
}

/** Formats the number of differences of each level, on one line if it fits. */
export function printStat({ changes, job, consequences, placement, program }: PlanDiff, width: number): string {
  if (!changes) return "the plans are the same\n";
  const of = (change: ProgramChange["change"]): number => instructionsOf(program, change);
  const line = [
    plural(job.length, "job key"),
    `${plural(placement.length, "axis").replace("axiss", "axes")}`,
    plural(consequences.length, "consequence"),
    `instructions: ${countText(of("added"))} added, ${countText(of("removed"))} removed, ${countText(of("changed"))} changed`,
  ].join("; ");
  return `${wrap(line, width, "  ").join("\n")}\n`;
}

/** Counts instructions: a change of equal layers is one per layer. */
export const instructionsOf = (program: readonly ProgramChange[], change: ProgramChange["change"]): number =>
  program.reduce((sum, p) => sum + (p.change === change ? Math.max(1, p.layers.length) : 0), 0);

/** Returns the old or the new value of a key as text. */
export const valueText = (change: FieldChange, side: "old" | "new"): string => (side in change ? JSON.stringify(change[side]) : "absent");

function jobLines(rows: readonly FieldChange[], width: number): string[] {
  const columns: Column[] = [{ head: "key" }, { head: "change" }];
  const cells = rows.map((c) => [c.path, `${valueText(c, "old")} -> ${valueText(c, "new")}`]);
  return [bold("job"), ...fitTable(columns, cells, { width, heads: false })];
}

const LABEL = 10;
const paints = { worse: warn, better: added, other: (text: string): string => text } as const;

const consequenceLines = ({ is, text }: Consequence, width: number): string[] => {
  const [first = "", ...more] = wrap(text, width - LABEL);
  const rest = more.length === 0 ? [] : wrap(more.map((line) => line.trim()).join(" "), width - LABEL);
  return [`  ${pad(paints[is](is === "other" ? "" : is), LABEL - 2)}${first}`, ...rest.map((line) => " ".repeat(LABEL) + line)];
};

function placementLines(rows: PlanDiff["placement"], width: number): string[] {
  const columns: Column[] = [{ head: "axis" }, { head: "before" }, { head: "after" }, { head: "groups", drop: 1 }];
  const cells = rows.map(({ axis, old, new: now }) => [
    axisTitle(axis),
    placedText(old),
    placedText(now),
    old.groups === now.groups ? "" : `${countText(old.groups)} -> ${countText(now.groups)}`,
  ]);
  return [bold("placement"), ...fitTable(columns, cells, { width })];
}

const units = { bytes: bytesText, flops: flopsText, count: countText, seconds: secondsText } as const;

/** Returns the rows in order: memory first, the largest change before others; then the rest, traffic last, which only a whole summary has. */
export function sortedSummary(rows: readonly SummaryChange[], isWhole: boolean): SummaryChange[] {
  const order = ({ what }: SummaryChange): number => (what.startsWith("memory") ? 0 : what.startsWith("traffic") ? 2 : 1);
  const size = (row: SummaryChange): number => (order(row) === 1 ? 0 : Math.abs(row.new - row.old));
  // consequences name the traffic
  return rows.filter((row) => isWhole || order(row) < 2).sort((x, y) => order(x) - order(y) || size(y) - size(x));
}

/** Returns a relative change as text. */
export function percentText(from: number, to: number): string {
  if (from === 0 || to === 0) return from === 0 ? "new" : "gone";
  const change = (100 * (to - from)) / from;
  return `${change > 0 ? "+" : ""}${change.toFixed(Math.abs(change) < 10 ? 1 : 0)} %`;
}

function summaryLines(rows: readonly SummaryChange[], width: number): string[] {
  const columns: Column[] = [
    { head: "stages" },
    { head: "what", wraps: true },
    { head: "before", right: true },
    { head: "after", right: true },
    { head: "change", right: true },
  ];
  const cells = rows.map((c) => [ranges(c.stages), c.what, units[c.unit](c.old), units[c.unit](c.new), percentText(c.old, c.new)]);
  return [bold("summary of a rank"), ...fitTable(columns, cells, { width })];
}

const programHead = (program: readonly ProgramChange[]): string =>
  `${bold("program")}: ${countText(instructionsOf(program, "added"))} instructions added, ${countText(instructionsOf(program, "removed"))} removed, ${countText(instructionsOf(program, "changed"))} changed`;

/** Instructions that come and go, collectives before others, then changed ones; many layers first. */
function sortedProgram(program: readonly ProgramChange[]): ProgramChange[] {
  const order = ({ change }: ProgramChange): number => (change === "changed" ? 1 : 0);
  const isCompute = ({ does, kind }: ProgramChange): number => (kind === "compute" ? 1 : does === "" ? 1 : 0);
  return [...program].sort((x, y) => order(x) - order(y) || isCompute(x) - isCompute(y) || y.layers.length - x.layers.length);
}

/** The least and the most columns of an id in a text that is cut. */
const ID = { least: 20, most: 60 } as const;

/** Returns an id of at most `most` columns: parts in its middle are left out. */
function shortId(id: string, most: number): string {
  if (id.length <= most) return id;
  const tail = id.slice(Math.max(id.length - most + 9, id.lastIndexOf(".", id.length - 2)));
  return `${id.slice(0, Math.max(8, most - tail.length - 1))}…${tail}`;
}

/** Formats a change: on one line if levels are cut. */
function programLines({ change, phase, id, does, layers, stages, differences }: ProgramChange, width: number, isWhole: boolean): string[] {
  const sign = { added: "+", removed: "-", changed: "~" }[change];
  const where = [
    phase,
    ...(layers.length > 0 ? [`layer${new Set(layers).size > 1 ? "s" : ""} ${ranges(layers)}`] : []),
    `stage${stages.length > 1 ? "s" : ""} ${ranges(stages)}`,
  ].join(", ");
  const what = differences.map((d) => `${d.what} ${d.old} -> ${d.new}`).join("; ");
  const before = `  ${sign} ${does ? `${does} ` : ""}`;
  const room = Math.min(ID.most, Math.max(ID.least, width - before.length - where.length - (what ? 8 : 5)));
  const line = `${before}${isWhole ? id : shortId(id, room)} (${where})${what ? `: ${what}` : ""}`;
  const [first = "", ...more] = fitLines([line], isWhole ? width : width - 2);
  return isWhole ? [first, ...more] : [more.length === 0 ? first : `${first} …`];
}
