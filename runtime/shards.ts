/**
 * Pieces of a tensor: which of its elements a rank holds and in which order, and how they go from one way of cutting to another.
 * A piece holds, of each dim, ascending ranges of the whole's indices, one behind the other.
 */

import type { Buffer } from "../schemas/plan.ts";
import { dimRanges, elementsOf, type MeshData, rankCoordinate } from "../schemas/sharding.ts";
import type { HostData } from "./backend.ts";

/** By dim, the whole's indices [from, to) that a piece holds. */
export type Ranges = readonly (readonly (readonly [from: number, to: number])[])[];
type Cut = Pick<Buffer, "sizes" | "shardedBy">;
type Factors = Pick<MeshData, "subAxes" | "per_stage">;

/** Of the rank with this number in its stage. */
export const shardRanges = (mesh: Factors, { sizes, shardedBy }: Cut, number: number): Ranges =>
  sizes.map((n, dim) => dimRanges(mesh, n, shardedBy[dim]!, shardedBy[dim]!, number));

const lengthsOf = (ranges: Ranges): number[] => ranges.map((dim) => dim.reduce((n, [from, to]) => n + to - from, 0));

/** Visits a piece as runs along its last dim: the index of each in the whole and in the piece, and its length. A scalar is one run. */
export function visitRuns(sizes: readonly number[], ranges: Ranges, visit: (whole: number, shard: number, length: number) => void): void {
  let at = 0;
  const walk = (dim: number, base: number) => {
    if (dim === ranges.length) return visit(base, at++, 1);
    for (const [from, to] of ranges[dim]!) {
      if (dim === ranges.length - 1) {
        visit(base * sizes[dim]! + from, at, to - from);
        at += to - from;
      } else for (let i = from; i < to; i++) walk(dim + 1, base * sizes[dim]! + i);
    }
  };
  walk(0, 0);
}

/** A rank's piece of a whole. */
export function shardOf<T extends HostData>(whole: T, { sizes, shape }: Pick<Buffer, "sizes" | "shape">, ranges: Ranges): T {
  const length = elementsOf(shape);
  const out = (whole instanceof Int32Array ? new Int32Array(length) : new Float32Array(length)) as T;
  visitRuns(sizes, ranges, (from, to, n) => out.set(whole.subarray(from, from + n), to));
  return out;
}

/** Runs that two pieces share along one dim. */
interface Shared {
  readonly from: number;
  readonly to: number;
  readonly length: number;
}
function sharedAlong(from: Ranges[number], to: Ranges[number]): Shared[] {
  const out: Shared[] = [];
  let [a, b, i, j] = [0, 0, 0, 0];
  while (i < from.length && j < to.length) {
    const [f, t] = [from[i]!, to[j]!];
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
  return out;
}

/** What two pieces of one whole share: nothing where this is undefined. */
export function sharedBy(from: Ranges, to: Ranges): Shared[][] | undefined {
  const dims = from.map((dim, i) => sharedAlong(dim, to[i]!));
  return dims.every((runs) => runs.length > 0) ? dims : undefined;
}

/** Copies what `sharedBy` found from one piece's values to the other's. */
export function copyShared(
  shared: readonly (readonly Shared[])[],
  [from, values]: readonly [Ranges, Float32Array],
  [to, out]: readonly [Ranges, Float32Array],
): void {
  const [theirs, ours] = [lengthsOf(from), lengthsOf(to)];
  const walk = (dim: number, a: number, b: number) => {
    if (dim === shared.length) {
      out[b] = values[a]!;
      return;
    }
    for (const run of shared[dim]!) {
      const [i, j] = [a * theirs[dim]! + run.from, b * ours[dim]! + run.to];
      if (dim === shared.length - 1) out.set(values.subarray(i, i + run.length), j);
      else for (let k = 0; k < run.length; k++) walk(dim + 1, i + k, j + k);
    }
  };
  walk(0, 0, 0);
}

/** Of the ranks of a stage that hold the same piece, the first: by number in the stage, who is the first of each piece. */
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
