/** The parts of saved shards that another sharding of the same tensor needs, and the elements of them in a range of a file. */
import type { ElementPiece } from "../backend.ts";
import type { SharedRun } from "../shards.ts";

/** A piece of a saved shard, from element `at` of it on. */
export interface StatePiece extends Omit<ElementPiece, "tensor"> {
  readonly at: number;
}

interface Dim {
  readonly runs: readonly SharedRun[];
  readonly theirs: number;
  readonly ours: number;
}

/**
 * Returns the pieces of an intersection (`sharedBy`). `theirs`, `ours`: the sizes of the saved shard and of the wanted one. Rows are those of
 * the dim before the last; outer dims that both shards have whole are merged into it.
 */
export function sharedPieces(shared: readonly (readonly SharedRun[])[], theirs: readonly number[], ours: readonly number[]): StatePiece[] {
  const one: Dim = { runs: [{ from: 0, to: 0, length: 1 }], theirs: 1, ours: 1 };
  const dims = [one, one, ...shared.map((runs, i): Dim => ({ runs, theirs: theirs[i] ?? 1, ours: ours[i] ?? 1 }))];
  const columns = dims.pop() ?? one;
  const outer: Dim[] = [];
  for (const dim of dims.reverse()) {
    const [inner] = outer;
    if (inner && isWhole(inner)) outer[0] = scaled(dim, inner.theirs);
    else outer.unshift(dim);
  }
  const rows = outer.pop() ?? one;
  const pieces: StatePiece[] = [];
  const walk = (n: number, a: number, b: number): void => {
    const dim = outer[n];
    if (dim) {
      for (const { from, to, length } of dim.runs)
        for (let k = 0; k < length; k++) walk(n + 1, a * dim.theirs + from + k, b * dim.ours + to + k);
      return;
    }
    for (const row of rows.runs)
      for (const column of columns.runs)
        pieces.push({
          ...{ rows: row.length, columns: column.length, stride: columns.theirs, rowStep: columns.ours, columnStep: 1 },
          at: (a * rows.theirs + row.from) * columns.theirs + column.from,
          to: (b * rows.ours + row.to) * columns.ours + column.to,
        });
  };
  walk(0, 0, 0);
  return pieces;
}

/** Returns whether both shards have all of a dim. */
function isWhole({ runs: [run, ...others], theirs, ours }: Dim): boolean {
  return others.length === 0 && run?.length === theirs && theirs === ours;
}

/** Returns a dim merged with an inner dim of this size. */
function scaled({ runs, theirs, ours }: Dim, size: number): Dim {
  const wide = runs.map(({ from, to, length }) => ({ from: from * size, to: to * size, length: length * size }));
  return { runs: wide, theirs: theirs * size, ours: ours * size };
}

/** Returns the part of a piece whose elements are in [from, to) of the saved shard: whole rows, and a part of the row at each end. */
export function cutPiece(piece: StatePiece, from: number, to: number): StatePiece[] {
  const { at, rows, columns, stride } = piece;
  const rowsOf = (first: number, count: number, start: number, width: number): StatePiece => ({
    ...piece,
    ...{ at: at + first * stride + start, rows: count, columns: width },
    to: piece.to + first * piece.rowStep + start * piece.columnStep,
  });
  let first = Math.max(0, Math.floor((from - at - columns) / stride) + 1);
  let last = Math.min(rows, Math.ceil((to - at) / stride));
  const cut: StatePiece[] = [];
  const cutRow = (row: number): boolean => {
    const begin = at + row * stride;
    const [start, end] = [Math.max(0, from - begin), Math.min(columns, to - begin)];
    if (start === 0 && end === columns) return false;
    cut.push(rowsOf(row, 1, start, end - start));
    return true;
  };
  if (first < last && cutRow(first)) first++;
  if (first < last && cutRow(last - 1)) last--;
  if (first < last) cut.push(rowsOf(first, last - first, 0, columns));
  return cut;
}
