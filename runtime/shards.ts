/**
 * Shards of a tensor: the elements that a rank holds, and copies between different shardings. A shard is the product of ascending index
 * ranges per dim, stored contiguously.
 */

import type { Buffer } from "../schemas/plan.ts";
import { dimRanges, elementsOf, type MeshData, rankCoordinate } from "../schemas/sharding.ts";
import type { HostData, ShardBox } from "./backend.ts";

/** Per dim, the index ranges [from, to) of the whole tensor that a shard holds. */
export type Ranges = readonly (readonly (readonly [from: number, to: number])[])[];
type Sharding = Pick<Buffer, "sizes" | "shardedBy">;
type Factors = Pick<MeshData, "subAxes" | "per_stage">;

/** Returns the ranges of the rank with this number in its stage. */
export const shardRanges = (mesh: Factors, { sizes, shardedBy }: Sharding, number: number): Ranges =>
  sizes.map((n, dim) => dimRanges(mesh, n, shardedBy[dim] ?? [], shardedBy[dim] ?? [], number));

/** Returns the sizes of a shard. */
export const lengthsOf = (ranges: Ranges): number[] => ranges.map((dim) => dim.reduce((n, [from, to]) => n + to - from, 0));

/** Returns the part of a shard that has the indices [from, to) of its first dim, counted within the shard. */
export function rowsWithin([first = [], ...rest]: Ranges, from: number, to: number): Ranges {
  let end = 0;
  const rows = first.flatMap(([a, b]) => {
    const start = end;
    end += b - a;
    const [low, high] = [Math.max(from, start), Math.min(to, end)];
    return low < high ? [[a + low - start, a + high - start] as const] : [];
  });
  return [rows, ...rest];
}

/** Visits a shard as contiguous runs along its last dim: the start in the whole and in the shard, and the length. A scalar is one run. */
export function visitRuns(sizes: readonly number[], ranges: Ranges, visit: (whole: number, shard: number, length: number) => void): void {
  let at = 0;
  const walk = (dim: number, base: number) => {
    const [own, size] = [ranges[dim], sizes[dim]];
    if (own === undefined || size === undefined) return visit(base, at++, 1);
    for (const [from, to] of own) {
      if (dim === ranges.length - 1) {
        visit(base * size + from, at, to - from);
        at += to - from;
      } else for (let i = from; i < to; i++) walk(dim + 1, base * size + i);
    }
  };
  walk(0, 0);
}

/** Returns a shard of one range per dim as rows within planes. Dims that the shard has whole are merged with the dim before them; throws if more than three are left. */
export function shardBox(sizes: readonly number[], ranges: Ranges): ShardBox {
  const dims: { start: number; length: number; size: number }[] = [];
  for (const [dim, size] of [...sizes.entries()].reverse()) {
    const [range, ...others] = ranges[dim] ?? [];
    if (!range || others.length > 0) throw new Error(`rankc: a shard has ${others.length + 1} ranges in one dim`);
    const own = { start: range[0], length: range[1] - range[0], size };
    const [inner] = dims;
    if (inner && inner.length === inner.size)
      dims[0] = { start: own.start * inner.size, length: own.length * inner.size, size: size * inner.size };
    else dims.unshift(own);
  }
  const one = { start: 0, length: 1, size: 1 };
  if (dims.length > 3) throw new Error("rankc: a parameter is sharded along more than three dims");
  const [plane, row, column] = [one, one, one, ...dims].slice(-3) as [typeof one, typeof one, typeof one];
  const planeStride = row.size * column.size;
  return {
    ...{ rows: plane.length * row.length, height: row.length, width: column.length, rowStride: column.size, planeStride },
    base: plane.start * planeStride + row.start * column.size + column.start,
  };
}

/** Returns a rank's shard of a whole tensor. */
export function shardOf<T extends HostData>(whole: T, { sizes, shape }: Pick<Buffer, "sizes" | "shape">, ranges: Ranges): T {
  const length = elementsOf(shape);
  const out = (whole instanceof Int32Array ? new Int32Array(length) : new Float32Array(length)) as T;
  visitRuns(sizes, ranges, (from, to, n) => out.set(whole.subarray(from, from + n), to));
  return out;
}

/** An index range that two shards share along one dim, with its start in each. */
export interface SharedRun {
  readonly from: number;
  readonly to: number;
  readonly length: number;
}
function sharedAlong(from: Ranges[number], to: Ranges[number]): SharedRun[] {
  const out: SharedRun[] = [];
  let [a, b, i, j] = [0, 0, 0, 0];
  for (;;) {
    const [f, t] = [from[i], to[j]];
    if (!f || !t) return out;
    const start = Math.max(f[0], t[0]);
    const end = Math.min(f[1], t[1]);
    if (start < end) out.push({ from: a + start - f[0], to: b + start - t[0], length: end - start });
    if (f[1] <= t[1]) {
      a += f[1] - f[0];
      i++;
    } else {
      b += t[1] - t[0];
      j++;
    }
  }
}

/** Returns the intersection of two shards per dim; undefined if it is empty. */
export function sharedBy(from: Ranges, to: Ranges): SharedRun[][] | undefined {
  const dims = from.map((dim, i) => sharedAlong(dim, to[i] ?? []));
  return dims.every((runs) => runs.length > 0) ? dims : undefined;
}

/** Copies the intersection that `sharedBy` returned from one shard to the other. */
export function copyShared(
  shared: readonly (readonly SharedRun[])[],
  [from, values]: readonly [Ranges, Float32Array],
  [to, out]: readonly [Ranges, Float32Array],
): void {
  const [theirs, ours] = [lengthsOf(from), lengthsOf(to)];
  const walk = (dim: number, a: number, b: number) => {
    const [runs, their, our] = [shared[dim], theirs[dim], ours[dim]];
    if (runs === undefined || their === undefined || our === undefined) {
      out.set(values.subarray(a, a + 1), b);
      return;
    }
    for (const run of runs) {
      const [i, j] = [a * their + run.from, b * our + run.to];
      if (dim === shared.length - 1) out.set(values.subarray(i, i + run.length), j);
      else for (let k = 0; k < run.length; k++) walk(dim + 1, i + k, j + k);
    }
  };
  walk(0, 0, 0);
}

/** Returns the first holder of each distinct shard, as numbers within the stage. */
export function firstHolders(mesh: Factors, { shardedBy }: Pick<Buffer, "shardedBy">): readonly number[] {
  const subAxes = shardedBy.flat();
  const seen = new Set<string>();
  const first: number[] = [];
  for (let n = 0; n < mesh.per_stage; n++) {
    const shard = subAxes.map((f) => rankCoordinate(mesh, n, f)).join();
    if (!seen.has(shard)) first.push(n);
    seen.add(shard);
  }
  return first;
}
