/** Placements: the layout and the stage of each value, with the checks that every layout must pass. */
import { isDisjointSubAxes, shardCount } from "../../../schemas/sharding.ts";
import { invariant, type Value } from "../../ops/op.ts";
import { idOf } from "../backward.ts";
import { type Layout, layoutKey } from "../layout.ts";
import { axesName, hasSeparateGrids, type Mesh, subAxesOf } from "../mesh.ts";
import type { Placement } from "./steps.ts";

/** Layouts and stages of the values that were placed so far. */
export class Placements {
  /** All sub-axes, ascending stride. */
  readonly every: readonly number[];
  readonly #placed = new Map<Value, Placement>();
  readonly #hasSeparateGrids: boolean;
  /** The one object of equal layouts, by key, and the numbers of these objects. */
  readonly #layouts = new Map<string, Layout>();
  readonly #numbers = new Map<Layout, number>();

  constructor(readonly mesh: Mesh) {
    this.#hasSeparateGrids = hasSeparateGrids(mesh);
    this.every = mesh.subAxes.map((_, f) => f);
  }

  get all(): ReadonlyMap<Value, Placement> {
    return this.#placed;
  }
  has(v: Value): boolean {
    return this.#placed.has(v);
  }
  /** Returns the placement of a value. Throws an invariant if it has none. */
  of(v: Value): Placement {
    const placed = this.#placed.get(v);
    invariant(placed !== undefined, () => `${idOf(v)} is used before an op produces it`);
    return placed;
  }
  /** Records the placement of a value, and returns it. Throws an invariant if a dim does not divide by its sub-axes, or if the layout mixes grids. */
  place(v: Value, layout: Layout, stage: number): Placement {
    this.requireOneGrid(v, layout);
    for (const [dim, fs] of layout.shardedBy.entries())
      invariant(
        (v.sizes[dim] ?? 0) % this.count(fs) === 0,
        () => `${idOf(v)}: dim ${dim} of ${v.sizes[dim]} elements does not divide by ${this.count(fs)}`,
      );
    const placed: Placement = { value: v, layout: this.unique(layout), stage };
    this.#placed.set(v, placed);
    return placed;
  }

  /** Returns the object that stands for all layouts that equal this one. */
  unique(layout: Layout): Layout {
    if (this.#numbers.has(layout)) return layout;
    // the key of a layout without dims is that of one replicated dim
    const key = `${layout.shardedBy.length} ${layoutKey({ layout })}`;
    const known = this.#layouts.get(key);
    if (known) return known;
    this.#layouts.set(key, layout);
    this.#numbers.set(layout, this.#numbers.size);
    return layout;
  }
  /** Returns the number of the layout in which a value is placed: equal layouts have equal numbers. */
  numberOf(v: Value): number {
    const number = this.#numbers.get(this.of(v).layout);
    invariant(number !== undefined, () => `the layout of ${idOf(v)} has no number`);
    return number;
  }

  /** Returns the number of blocks that sub-axes shard a dim into. */
  count(fs: readonly number[]): number {
    return shardCount(this.mesh, fs);
  }
  /** Returns the sub-axes of each dim, outermost first, for the axes that a model declares. */
  sharding(axesOfDims: NonNullable<Value["shardAxes"]>): Layout["shardedBy"] {
    return axesOfDims.map((axes) => axes.flatMap((a) => subAxesOf(this.mesh, a).toReversed()));
  }
  /** Returns the layout that the model declares for a value; replicated if it declares none. */
  declared(v: Value): Layout {
    return { ...replicated(v), ...(v.shardAxes && { shardedBy: this.sharding(v.shardAxes) }) };
  }
  /** Throws an invariant if layouts of a value use sub-axes of both grids where the grids do not nest. */
  requireOneGrid(v: Value, ...layouts: readonly Layout[]): void {
    if (!this.#hasSeparateGrids) return;
    const fs = [...new Set(layouts.flatMap((l) => [...l.shardedBy.flat(), ...l.partialSum, ...l.partialMax]))];
    invariant(
      isDisjointSubAxes(this.mesh, fs),
      () => `${idOf(v)} would be sharded by ${axesName(this.mesh, fs, false)}, which are of grids that do not nest`,
    );
  }
}

/** Returns the layout of a value that every rank holds completely. */
export const replicated = (v: Value): Layout => ({ shardedBy: v.sizes.map(() => []), partialSum: [], partialMax: [] });
