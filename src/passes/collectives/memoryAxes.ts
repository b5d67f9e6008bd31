/**
 * A sharded value as axes in memory: per dim the sub-axes that number its blocks and do not shard it, then the local block. Two values
 * with the same axes in another order differ by one strided copy.
 */
import type { Buffer, Compute } from "../../../schemas/plan.ts";
import { shardCount } from "../../../schemas/sharding.ts";
import { invariant } from "../../ops/op.ts";
import type { Mesh } from "../mesh.ts";

/** One axis in memory, outermost first: a sub-axis within a dim, the local block of a dim, or a list of rows. */
export type MemoryAxis =
  | { readonly kind: "sub-axis"; readonly subAxis: number; readonly size: number }
  | { readonly kind: "dim"; readonly dim: number; readonly size: number }
  | { readonly kind: "rows"; readonly size: number };
/** An axis that numbers blocks. */
export type BlockAxis = Extract<MemoryAxis, { readonly kind: "sub-axis" }>;

/** Returns a key that two axes share if and only if they are the same axis. */
const keyOf = (a: MemoryAxis): string => (a.kind === "sub-axis" ? `sub-axis ${a.subAxis}` : a.kind === "dim" ? `dim ${a.dim}` : "rows");

/** Returns the number of elements that axes span. */
export const countOf = (axes: readonly MemoryAxis[]): number => axes.reduce((n, a) => n * a.size, 1);

/** Returns sub-axes as axes in memory. */
export const blockAxesOf = (mesh: Mesh, fs: readonly number[]): BlockAxis[] =>
  fs.map((subAxis) => ({ kind: "sub-axis", subAxis, size: shardCount(mesh, [subAxis]) }));

/** Returns whether an axis is one of a group. */
export const isIn = (group: readonly BlockAxis[], a: MemoryAxis): boolean =>
  a.kind === "sub-axis" && group.some(({ subAxis }) => subAxis === a.subAxis);

/** Returns whether two lists of axes describe the same memory. */
export function isSameMemory(a: readonly MemoryAxis[], b: readonly MemoryAxis[]): boolean {
  const real = (axes: readonly MemoryAxis[]) => axes.filter((x) => x.size > 1).map(keyOf);
  return real(a).join() === real(b).join();
}

/** Returns the axes in memory of a buffer from dim `first` on. `numbering` gives per dim the sub-axes that number its blocks. */
export function axesOf(mesh: Mesh, b: Buffer, numbering: readonly (readonly number[])[], first: number): MemoryAxis[] {
  return b.sizes.flatMap((n, dim) => {
    if (dim < first) return [];
    const shardedBy = b.shardedBy[dim] ?? [];
    const counted = numbering[dim] ?? shardedBy;
    const left = counted.filter((f) => !shardedBy.includes(f));
    return [...blockAxesOf(mesh, left), { kind: "dim", dim, size: n / shardCount(mesh, counted) }];
  });
}

/** The attributes of `arrange`, sizes n0, n1, … with strides s0, s1, …, and the blocks of which it reads this rank's. */
interface Copy {
  readonly attrs: Readonly<Record<string, number>>;
  readonly blocks: NonNullable<Compute["blocks"]>;
}

/**
 * Returns the copy from axes to other axes. An axis that `have` lacks is repeated; along the sub-axes in `pick` only this rank's block is
 * read.
 */
export function arrangement(mesh: Mesh, have: readonly MemoryAxis[], want: readonly MemoryAxis[], pick: readonly number[]): Copy {
  const strides = new Map<string, number>();
  let step = 1;
  for (const a of have.toReversed()) {
    strides.set(keyOf(a), step);
    step *= a.size;
  }
  const runs: { size: number; readonly stride: number }[] = [];
  for (const a of want) {
    if (a.size === 1) continue;
    const stride = strides.get(keyOf(a)) ?? 0;
    const last = runs.at(-1);
    // two axes that are contiguous in the source are one
    if (last && last.stride === stride * a.size) runs[runs.length - 1] = { size: last.size * a.size, stride };
    else runs.push({ size: a.size, stride });
  }
  if (!runs.length) runs.push({ size: 1, stride: 1 });
  const blocks = blockAxesOf(mesh, pick).map((axis) => {
    const stride = strides.get(keyOf(axis));
    invariant(stride !== undefined, () => `the source has no blocks along ${keyOf(axis)}`);
    return { subAxis: axis.subAxis, stride };
  });
  return {
    attrs: Object.fromEntries(runs.flatMap(({ size, stride }, n) => [[`n${n}`, size] as const, [`s${n}`, stride] as const])),
    blocks,
  };
}
