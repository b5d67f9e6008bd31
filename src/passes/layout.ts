/** Layouts of a value over the factors of a mesh, and the moves between two of them. */
import type { How } from "../../schemas/plan.ts";
import type { Value } from "../ops/op.ts";

export interface Layout {
  readonly cuts: readonly (readonly number[])[];
  readonly sum: readonly number[];
  readonly max: readonly number[];
}
/** A value in one layout. `note` tells copies apart that are made more than once, or stand halfway between two moves. */
export interface Piece {
  readonly value: Value;
  readonly layout: Layout;
  readonly note?: string;
}
/** How a piece comes into another layout; a `slice` concerns one rank alone, and so does a `fold`, into another value. */
export type Change = How | "slice" | "fold";
export const WHOLE = -1;
export const SUM = -2;
export const MAX = -3;
/** What a factor does to a tensor: the slot it cuts, or WHOLE, SUM, MAX. */
export const placeOf = (l: Layout, f: number): number =>
  l.sum.includes(f) ? SUM : l.max.includes(f) ? MAX : l.cuts.findIndex((c) => c.includes(f));
export const layoutKey = ({ layout: l, note = "" }: Piece): string =>
  `${l.cuts.map((c) => c.join(".")).join(",")}${l.sum.length ? `+${l.sum.join(".")}` : ""}${l.max.length ? `^${l.max.join(".")}` : ""}${note}`;

/** Moves of one value run in this order. */
export const sequence: readonly Change[] = ["slice", "reduce_scatter", "all_to_all", "all_gather", "all_reduce", "all_reduce_max"];
export const howOf = (from: number, to: number): Change | undefined =>
  from === to
    ? undefined
    : from === MAX
      ? "all_reduce_max"
      : from === SUM
        ? to === WHOLE
          ? "all_reduce"
          : "reduce_scatter"
        : from === WHOLE
          ? "slice"
          : to === WHOLE
            ? "all_gather"
            : "all_to_all";
/** Blocks nest when one list of factors continues the other: factors join and leave a slot at its inner end. */
export const continues = (a: readonly number[], b: readonly number[]) => a.every((f, i) => b[i] === f);
