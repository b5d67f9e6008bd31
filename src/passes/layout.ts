/** Layouts of a value over the factors of a mesh, and the moves between two of them. */
import type { CollectiveKind } from "../../schemas/plan.ts";
import type { Value } from "../ops/op.ts";

export interface Layout {
  readonly shardedBy: readonly (readonly number[])[];
  readonly partialSum: readonly number[];
  readonly partialMax: readonly number[];
}
/** A value in one layout. `note` tells copies apart that are made more than once, or stand halfway between two moves. */
export interface ShardedValue {
  readonly value: Value;
  readonly layout: Layout;
  readonly note?: string;
}
/** How a piece comes into another layout; a `slice` concerns one rank alone, and so does a `fold`, into another value. */
export type ReshardKind = CollectiveKind | "slice" | "regrid";
export const REPLICATED = -1;
export const PARTIAL_SUM = -2;
export const PARTIAL_MAX = -3;
/** What a factor does to a tensor: the slot it cuts, or WHOLE, SUM, MAX. */
export const shardingOf = (l: Layout, f: number): number =>
  l.partialSum.includes(f) ? PARTIAL_SUM : l.partialMax.includes(f) ? PARTIAL_MAX : l.shardedBy.findIndex((c) => c.includes(f));
export const layoutKey = ({ layout: l, note = "" }: ShardedValue): string =>
  `${l.shardedBy.map((c) => c.join(".")).join(",")}${l.partialSum.length ? `+${l.partialSum.join(".")}` : ""}${l.partialMax.length ? `^${l.partialMax.join(".")}` : ""}${note}`;

/** Moves of one value run in this order. */
export const reshardOrder: readonly ReshardKind[] = ["slice", "reduce_scatter", "all_to_all", "all_gather", "all_reduce", "all_reduce_max"];
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
/** Blocks nest when one list of factors continues the other: factors join and leave a slot at its inner end. */
export const continues = (a: readonly number[], b: readonly number[]) => a.every((f, i) => b[i] === f);
