/** The lines between instructions of a section: a value goes from the instruction that writes it to those that read it. */
import type { PlacedView, PlanModel } from "./planModel.ts";

/** A value from row to row; rows are counted within the section. */
export interface Track {
  readonly from: number;
  readonly to: readonly number[];
  /** The column, 0 is next to the nodes; -1: the only reader is the next row. */
  readonly column: number;
}

/** The most columns; values beyond share the last. */
const MOST = 9;

/** Returns the tracks of a section: a column is free for another value after the last reader of one. */
export function tracksOf(model: PlanModel, instructions: readonly PlacedView[]): Track[] {
  const writers = new Map<string, number>();
  const readers = new Map<number, Set<number>>();
  for (const [row, i] of instructions.entries()) {
    for (const id of i.view.reads) {
      const from = writers.get(model.idIn(i, id));
      if (from !== undefined && from !== row) readers.set(from, (readers.get(from) ?? new Set()).add(row));
    }
    for (const id of i.view.writes) writers.set(model.idIn(i, id), row);
  }
  const ends: number[] = [];
  return [...readers]
    .sort(([a], [b]) => a - b)
    .map(([from, to]) => {
      const rows = [...to].sort((a, b) => a - b);
      const last = rows.at(-1) ?? from;
      if (rows.length === 1 && last === from + 1) return { from, to: rows, column: -1 };
      let column = ends.findIndex((end) => end <= from);
      if (column < 0) column = Math.min(MOST - 1, ends.length);
      ends[column] = Math.max(ends[column] ?? 0, last);
      return { from, to: rows, column };
    });
}
