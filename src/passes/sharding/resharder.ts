/** Resharder: makes a value available on a stage and in a layout, by transfers, collectives and local copies. Each copy is made once. */
import { invariant, type Node, type Value } from "../../ops/op.ts";
import { idOf } from "../backward.ts";
import {
  continues,
  type Layout,
  layoutKey,
  PARTIAL_MAX,
  PARTIAL_SUM,
  pairs,
  reshardKind,
  reshardOrder,
  type ShardedValue,
  shardingOf,
  type Variant,
} from "../layout.ts";
import type { Placements } from "./placements.ts";
import type { Reason, ShardStep } from "./steps.ts";

/** Copies of one value, by stage and layout, and whether each was made in backward. */
type Available = Map<string, { readonly shardedValue: ShardedValue; readonly backward: boolean }>;

/** Where a copy is needed, and the list that receives the steps. */
export interface Destination {
  /** The virtual stage. */
  readonly stage: number;
  readonly backward: boolean;
  /**
   * Whether ops there number ragged rows by their places. Then the tokens of a rank need not be one block: rows that come from other nodes are
   * of the blocks of all these, and go back to them. The layout of their tokens on both sides is pinned.
   */
  readonly byPlace?: boolean | undefined;
  /** Returns the origin of a step over some sub-axes. */
  readonly why: (subAxes: readonly number[]) => Reason;
  readonly into: ShardStep[];
}

/** Inserts reshards, and reuses values that exist in the layout already. */
export class Resharder {
  readonly #placements: Placements;
  readonly #roleOf: (stage: number) => number;
  readonly #copies = new Map<Value, Available>();
  /** Per value, for each physical stage the virtual stage that first has a copy. Copies of later virtual stages are variants. */
  readonly #holders = new Map<Value, Map<number, number>>();

  /** `roleOf` returns the physical stage whose ranks run a virtual stage. */
  constructor(placements: Placements, roleOf: (stage: number) => number) {
    this.#placements = placements;
    this.#roleOf = roleOf;
  }

  /** Emits transfers, then reshard steps. All-gathers are repeated in backward, so that gathered values do not stay in memory. Returns the copy. */
  reshard(v: Value, want: Layout, destination: Destination): ShardedValue {
    const { byPlace } = destination;
    const placed = this.#placements.of(v);
    const { layout } = placed;
    // most operands are where the op needs them
    if (layout === want && placed.stage === destination.stage) return placed;
    invariant(
      !v.local || this.#placements.every.every((f) => isWayToExpert(v, shardingOf(layout, f), shardingOf(want, f))),
      () => `${idOf(v)} has rows of each rank alone, which go to the ranks of their experts and nowhere else`,
    );
    const start = this.#deliver(v, destination);
    const nests = (a: readonly number[], b: readonly number[], dim: number) =>
      dim < v.ragged && (byPlace || (v.node && isByPlace(v.node))) ? isPartOf(a, b) : continues(a, b);
    const isReordered = pairs(layout.shardedBy, want.shardedBy).map(([from, to], dim) => !nests(from, to, dim) && !nests(to, from, dim));
    if (!isReordered.some(Boolean)) return this.#reshardFrom(start, want, destination);
    // sub-axes of a dim change their order: gather that dim first
    const gathered = pairs(layout.shardedBy, isReordered).map(([fs, reordered]) => (reordered ? [] : fs));
    return this.#reshardFrom(this.#reshardFrom(start, { ...layout, shardedBy: gathered }, destination), want, destination);
  }

  #available(v: Value): Available {
    const known: Available = this.#copies.get(v) ?? new Map();
    this.#copies.set(v, known);
    return known;
  }

  /** Returns the virtual stage itself if an earlier one of the same ranks has a copy too; undefined if it is the first. */
  #laterStage(v: Value, stage: number): number | undefined {
    const first = this.#placements.of(v).stage;
    const holders = this.#holders.get(v) ?? new Map([[this.#roleOf(first), first]]);
    this.#holders.set(v, holders);
    const holder = holders.get(this.#roleOf(stage)) ?? stage;
    holders.set(this.#roleOf(stage), holder);
    return holder === stage ? undefined : stage;
  }

  /** Sends a value from its virtual stage to another through all stages between: a stage receives from its neighbours only. */
  #deliver(v: Value, { stage, backward, why, into }: Destination): ShardedValue {
    const at = this.#placements.of(v);
    const known = this.#available(v);
    let shardedValue: ShardedValue = at;
    // every stage has the inputs; all chunks of a rank share its parameters
    if (v.leaf?.kind === "input" || (v.leaf && this.#roleOf(at.stage) === this.#roleOf(stage))) return shardedValue;
    const direction = Math.sign(stage - at.stage);
    for (let from = at.stage; from !== stage; from += direction) {
      const to = from + direction;
      const received: ShardedValue = { value: v, layout: at.layout, variant: { virtualStage: this.#laterStage(v, to) } };
      const key = `${to}|${layoutKey(received)}`;
      if (!known.has(key)) {
        const origin = { ...why([]), because: "the next layer is on another stage", path: "parallel.pipeline" };
        into.push({ kind: "send", stage: from, to, shardedValue, received, backward, why: origin });
        known.set(key, { shardedValue: received, backward });
      }
      shardedValue = received;
    }
    return shardedValue;
  }

  /** Emits the reshard steps between two layouts in which no dim changes the order of its sub-axes. */
  #reshardFrom(first: ShardedValue, target: Layout, { stage, backward, why, into }: Destination): ShardedValue {
    const v = first.value;
    const { every } = this.#placements;
    this.#placements.requireOneGrid(v, first.layout, target);
    const known = this.#available(v);
    const virtualStage = this.#laterStage(v, stage);
    if (isSame(first.layout, target)) return first;
    const blockAxes = pairs(first.layout.shardedBy, target.shardedBy).map(([from, to]) => (from.length > to.length ? from : to));
    let shardedValue = first;
    for (const how of reshardOrder) {
      const subAxes = every.filter((f) => reshardKind(shardingOf(first.layout, f), shardingOf(target, f)) === how);
      if (!subAxes.length) continue;
      const { layout: before } = shardedValue;
      const now = (f: number) => shardingOf(subAxes.includes(f) ? target : before, f);
      const layout: Layout = {
        shardedBy: blockAxes.map((fs, dim) => fs.filter((f) => now(f) === dim)),
        partialSum: every.filter((f) => now(f) === PARTIAL_SUM),
        partialMax: every.filter((f) => now(f) === PARTIAL_MAX),
      };
      const repeats = shardedValue.variant?.repeats ? 1 : 0;
      const numbered = !isSame(layout, target) && isIntermediate(layout, blockAxes);
      const variant: Variant = { virtualStage, blockAxes: numbered ? blockAxes : undefined, repeats };
      const to: ShardedValue = { value: v, layout, variant };
      const key = `${stage}|${layoutKey(to)}`;
      const made = known.get(key);
      if (made && (how !== "all_gather" || made.backward === backward)) {
        shardedValue = made.shardedValue;
        continue;
      }
      const fresh: ShardedValue = made ? { ...to, variant: { ...variant, repeats: repeats + 1 } } : to;
      into.push({ kind: "collective", stage, how, subAxes, from: shardedValue, to: fresh, blockAxes, backward, why: why(subAxes) });
      known.set(key, { shardedValue: fresh, backward });
      shardedValue = fresh;
    }
    return shardedValue;
  }
}

/** Returns whether a node has its rows by place, on the ranks of nodes. */
export const isByPlace = ({ pins = [] }: Node): boolean => pins.some(({ across }) => across !== undefined);

/** Returns whether `b` has the sub-axes of `a` in the same order. */
const isPartOf = (a: readonly number[], b: readonly number[]): boolean =>
  areEqual(
    a,
    b.filter((f) => a.includes(f)),
  );

/**
 * Returns whether a sub-axis may change from one dim of a ragged value to another where its rows are numbered by their places: rows go to the
 * ranks of their experts and back, and their numbers stay.
 */
function isWayToExpert({ ragged }: Value, from: number, to: number): boolean {
  const expert = ragged - 1;
  const isOfPlaces = (dim: number): boolean => dim >= 0 && dim < expert;
  return from === to || (isOfPlaces(from) ? to === expert : !isOfPlaces(to) || from === expert);
}

const isSame = (a: Layout, b: Layout): boolean =>
  areEqual(a.partialSum, b.partialSum) &&
  areEqual(a.partialMax, b.partialMax) &&
  a.shardedBy.every((fs, dim) => areEqual(fs, b.shardedBy[dim] ?? []));
const areEqual = (a: readonly number[], b: readonly number[]): boolean => a.length === b.length && a.every((f, i) => b[i] === f);

/** Returns whether blocks are numbered by sub-axes that do not shard their dim. Then the layout alone does not identify the copy. */
const isIntermediate = ({ shardedBy }: Layout, blockAxes: Layout["shardedBy"]): boolean =>
  pairs(shardedBy, blockAxes).some(([fs, blocks]) => !continues(fs, blocks));
