/**
 * Draws a schedule as text: one row per stage, one column per unit of time (schedule.ts defines the units of each block). It shows
 * dependencies, not seconds.
 */
import type { BlockRun } from "../../schemas/plan.ts";
import { blockTag } from "../../schemas/program.ts";
import { bubbleOf, durationOf, timesOf } from "../passes/schedule.ts";
import { largest } from "../units.ts";

/** A drawn schedule. */
export interface SchedulePicture {
  readonly rows: readonly string[];
  /** The meaning and the length of each block name. */
  readonly legend: string;
  /** The length of the schedule in units. */
  readonly units: number;
  /** The fraction of idle units, over all stages. */
  readonly bubble: number;
}

/** Returns the length of the longest name of block runs: the one with the largest numbers. */
function longestTag(order: readonly BlockRun[], chunks: number): number {
  const [first] = order;
  if (!first) return 0;
  let [microbatch, chunk] = [0, 0];
  for (const run of order) [microbatch, chunk] = [Math.max(microbatch, run.microbatch), Math.max(chunk, run.chunk)];
  return blockTag({ ...first, microbatch, chunk }, chunks).length;
}

/** Draws the block runs of all stages. Rows take about `widest` columns behind the name of the stage; what does not fit is left out in the middle. */
export function drawSchedule(orders: readonly (readonly BlockRun[])[], chunks: number, widest = 100): SchedulePicture {
  const stages = timesOf(orders, chunks);
  const units = durationOf(stages);
  const isPaired = orders.some(hasPairs);
  const width = largest(orders, (order) => longestTag(order, chunks), 2) + (isPaired ? 2 : 1);
  const shown = Math.max(6, Math.floor(widest / width));
  const cut = units > shown ? { from: Math.ceil(shown / 2), to: units - Math.floor(shown / 2) + 1 } : undefined;
  const rows = stages.map((lanes, stage) => {
    const cells = Array.from({ length: units }, () => ".");
    for (const { run, start, end } of lanes) {
      if (cut && start >= cut.from && end <= cut.to) continue;
      const tag = blockTag(run, chunks) + (run.paired ? "+" : "");
      for (let t = start; t < end; t++) cells[t] = t === start ? tag : "-".repeat(tag.length);
    }
    const visible = cut ? [...cells.slice(0, cut.from), "…", ...cells.slice(cut.to)] : cells;
    return `stage ${String(stage).padStart(String(orders.length - 1).length)} | ${visible.map((cell) => cell.padEnd(width)).join("")}`.trimEnd();
  });
  if (cut) rows.push(`(units ${cut.from}..${cut.to - 1} of ${units} are left out at …)`);
  const split = orders.some((order) => order.some(({ kind }) => kind === "weights"));
  const legend = `F forward one unit, B backward ${split ? "of inputs one, W of weights one" : "two"}${chunks > 1 ? "; .c is the chunk" : ""}${isPaired ? "; + alternates with the next" : ""}`;
  return { rows, legend, units, bubble: bubbleOf(stages) };
}

const hasPairs = (order: readonly BlockRun[]): boolean => order.some(({ paired }) => paired);

/** The share of a column that one kind must fill to have its letter, and that must be idle for a dot. */
const MOSTLY = { kind: 0.9, idle: 0.5 } as const;
const letters: Readonly<Record<BlockRun["kind"], string>> = { forward: "F", backward: "B", weights: "W" };

/** Draws the whole step with `width` columns a stage; nothing if units have a column each. */
export function drawStrips(orders: readonly (readonly BlockRun[])[], chunks: number, width: number): string[] {
  const stages = timesOf(orders, chunks);
  const units = durationOf(stages);
  if (units <= width) return [];
  const each = units / width;
  return stages.map((lanes, stage) => {
    const shares = Array.from({ length: width }, () => ({ forward: 0, backward: 0, weights: 0 }));
    for (const { run, start, end } of lanes)
      for (let column = Math.floor(start / each); column * each < end && column < width; column++) {
        const share = shares[column];
        if (share) share[run.kind] += (Math.min(end, (column + 1) * each) - Math.max(start, column * each)) / each;
      }
    const text = shares.map((share) => {
      const busy = share.forward + share.backward + share.weights;
      if (busy <= 1 - MOSTLY.idle) return ".";
      const kind = (["forward", "backward", "weights"] as const).find((k) => share[k] >= MOSTLY.kind * busy);
      return kind ? letters[kind] : "#";
    });
    return `  stage ${String(stage).padStart(String(orders.length - 1).length)} | ${text.join("")}`;
  });
}
