/** Layouts of a value over the sub-axes of a mesh, and the reshard steps between two layouts. */
import type { CollectiveKind } from "../../schemas/plan.ts";
import { invariant, type Value } from "../ops/op.ts";

/** How a value is distributed. All numbers are indices of sub-axes of the mesh. */
export interface Layout {
  /** Per dim, the sub-axes that shard it, outermost first. */
  readonly shardedBy: readonly (readonly number[])[];
  /** Sub-axes over which a sum is pending. */
  readonly partialSum: readonly number[];
  /** Sub-axes over which a maximum is pending. */
  readonly partialMax: readonly number[];
}
/** A value in one layout. `note` distinguishes copies with the same layout: repeated gathers and intermediate reshard results. */
export interface ShardedValue {
  readonly value: Value;
  readonly layout: Layout;
  readonly note?: string;
}
/** One reshard step: a collective, or a local copy. `slice` takes this rank's block; `regrid` renumbers tokens into another value. */
export type ReshardKind = CollectiveKind | "slice" | "regrid";
/** The value does not depend on the coordinate of a sub-axis. Result of `shardingOf`, like the two below. */
export const REPLICATED = -1;
/** A sum over a sub-axis is pending. */
export const PARTIAL_SUM = -2;
/** A maximum over a sub-axis is pending. */
export const PARTIAL_MAX = -3;
/** Returns the dim that sub-axis `f` shards, or REPLICATED, PARTIAL_SUM or PARTIAL_MAX. */
export const shardingOf = (l: Layout, f: number): number =>
  l.partialSum.includes(f) ? PARTIAL_SUM : l.partialMax.includes(f) ? PARTIAL_MAX : l.shardedBy.findIndex((c) => c.includes(f));
/** Returns a key that is equal for two copies of one value if and only if layout and note are equal. */
export const layoutKey = ({ layout: l, note = "" }: ShardedValue): string =>
  `${l.shardedBy.map((c) => c.join(".")).join(",")}${l.partialSum.length ? `+${l.partialSum.join(".")}` : ""}${l.partialMax.length ? `^${l.partialMax.join(".")}` : ""}${note}`;

/** Returns the elements of two lists in pairs. Throws an invariant if the lengths differ: both have one element per dim, or per operand. */
export function pairs<A, B>(a: readonly A[], b: readonly B[]): (readonly [A, B])[] {
  invariant(a.length === b.length, () => `lists of ${a.length} and ${b.length} elements are read in pairs`);
  const rest = b[Symbol.iterator]();
  return a.flatMap((x) => {
    const next = rest.next();
    return next.done ? [] : [[x, next.value] as const];
  });
}

/** The order in which the reshard steps of one value run. */
export const reshardOrder: readonly ReshardKind[] = ["slice", "reduce_scatter", "all_to_all", "all_gather", "all_reduce", "all_reduce_max"];
/** Returns the reshard step of one sub-axis between two results of `shardingOf`; undefined if they are equal. */
export const reshardKind = (from: number, to: number): ReshardKind | undefined =>
  from === to
    ? undefined
    : from === PARTIAL_MAX
      ? "all_reduce_max"
      : from === PARTIAL_SUM
        ? to === REPLICATED
          ? "all_reduce"
          : "reduce_scatter"
        : from === REPLICATED
          ? "slice"
          : to === REPLICATED
            ? "all_gather"
            : "all_to_all";
/** Returns whether `b` starts with `a`. Then blocks nest: sub-axes are added and removed at the inner end of a dim. */
export const continues = (a: readonly number[], b: readonly number[]) => a.every((f, i) => b[i] === f);
