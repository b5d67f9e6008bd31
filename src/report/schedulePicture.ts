/**
 * The order of microbatches as a picture: a row per stage, a column per unit of time (schedule.ts says what takes how many). It
 * shows who waits for whom, not seconds.
 */
import { bubbleOf, durationOf, timesOf } from "../passes/schedule.ts";
import { largest } from "../units.ts";

export interface SchedulePicture {
  readonly rows: readonly string[];
  /** What a name stands for, and how long it takes. */
  readonly legend: string;
  /** Units from the first forward to the last block. */
  readonly units: number;
  /** Share of the units in which a stage waits, over all stages. */
  readonly bubble: number;
}

const widest = 100;

export function drawSchedule(orders: readonly (readonly string[])[], chunks: number): SchedulePicture {
  const stages = timesOf(orders, chunks);
  const units = durationOf(stages);
  const width = largest(orders.flat(), (tag) => tag.length, 2) + 1;
  const shown = Math.max(6, Math.floor(widest / width));
  const cut = units > shown ? { from: Math.ceil(shown / 2), to: units - Math.floor(shown / 2) + 1 } : undefined;
  const rows = stages.map((lanes, stage) => {
    const cells = Array.from({ length: units }, () => ".");
    for (const { tag, start, end } of lanes) for (let t = start; t < end; t++) cells[t] = t === start ? tag : "-".repeat(tag.length);
    const visible = cut ? [...cells.slice(0, cut.from), "…", ...cells.slice(cut.to)] : cells;
    return `stage ${String(stage).padStart(String(orders.length - 1).length)} | ${visible.map((cell) => cell.padEnd(width)).join("")}`.trimEnd();
  });
  if (cut) rows.push(`(units ${cut.from}..${cut.to - 1} of ${units} are left out at …)`);
  const split = orders.some((order) => order.some((tag) => tag.startsWith("W")));
  const legend = `F forward one unit, B backward ${split ? "of inputs one, W of weights one" : "two"}${chunks > 1 ? "; .c is the chunk" : ""}`;
  return { rows, legend, units, bubble: bubbleOf(stages) };
}
