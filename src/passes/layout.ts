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
/** What distinguishes copies of a value that have the same layout. */
export interface Variant {
  /** The virtual stage that the copy is made for, if an earlier virtual stage of the same ranks has one too. */
  readonly virtualStage?: number | undefined;
  /** Of an intermediate reshard result: per dim, the sub-axes that number its blocks. */
  readonly blockAxes?: Layout["shardedBy"] | undefined;
  /** How many steps behind the copy are repeated gathers of backward. */
  readonly repeats?: number | undefined;
}
/** A value in one layout. */
export interface ShardedValue {
  readonly value: Value;
  readonly layout: Layout;
  readonly variant?: Variant | undefined;
}
/** Returns a variant as part of a name: `.v3` names the virtual stage, `~` and `blocks` an intermediate result, `.again` a repeated gather. */
export const variantText = ({ virtualStage, blockAxes, repeats = 0 }: Variant, blocks: string): string =>
  `${virtualStage === undefined ? "" : `.v${virtualStage}`}${blockAxes ? `~${blocks}` : ""}${".again".repeat(repeats)}`;
/** Returns the sub-axes that number the blocks of each dim as text: `0.1,,2`. */
export const blockAxesText = (blockAxes: Layout["shardedBy"]): string => blockAxes.map((fs) => fs.join(".")).join(",");
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
/** Returns a key that is equal for two copies of one value if and only if layout and variant are equal. */
export const layoutKey = ({ layout: l, variant = {} }: Omit<ShardedValue, "value"> & Partial<ShardedValue>): string =>
  `${blockAxesText(l.shardedBy)}${l.partialSum.length ? `+${l.partialSum.join(".")}` : ""}${l.partialMax.length ? `^${l.partialMax.join(".")}` : ""}${variantText(variant, blockAxesText(variant.blockAxes ?? []))}`;

/** Returns the elements of two lists in pairs. Throws an invariant if the lengths differ: both have one element per dim, or per operand. */
export function pairs<A, B>(a: readonly A[], b: readonly B[]): (readonly [A, B])[] {
  invariant(a.length === b.length, () => `lists of ${a.length} and ${b.length} elements are read in pairs`);
  // most of a compile reads lists in pairs: an iterator over `b` would take three times as long
  return a.map((x, at) => [x, b[at]!] as const);
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
