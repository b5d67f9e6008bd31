/**
 * Exchange of ragged rows. Rows travel in lists of a fixed capacity, each with its index, because the number of rows is known on the
 * device only: split by destination, exchange, merge in order.
 */
import type { Buffer } from "../../../schemas/plan.ts";
import { shardCount } from "../../../schemas/sharding.ts";
import { boundOfRows } from "../../analysis/cost.ts";
import { invariant } from "../../ops/op.ts";
import { invertRows, mergeRows, splitRows, takeRows } from "../../ops/rearrange.ts";
import type { Reshard } from "../programBuilder.ts";
import { exchangeBlocks } from "./blockExchange.ts";
import type { Emitter } from "./emitter.ts";
import { axesOf, type BlockAxis, countOf, isSameMemory, type MemoryAxis } from "./memoryAxes.ts";

/** The buffers that map the rows of one index to the rows of another. */
interface Route {
  /** Row map of the lists by destination, [lists · cap]; absent if rows are not split by destination. */
  readonly split?: string | undefined;
  /** Row map of the merged lists; absent if received lists are not merged. */
  readonly merged?: string | undefined;
}
/** A reshard of rows: both buffers, the group, the axes that rows are sent along and received from, the capacity of a list in rows. */
interface RowReshard {
  readonly i: Reshard;
  readonly a: Buffer;
  readonly b: Buffer;
  readonly group: readonly BlockAxis[];
  readonly into: readonly BlockAxis[];
  readonly outOf: readonly BlockAxis[];
  readonly cap: number;
}
/** Index lists on their way, as a buffer with its axes. */
interface Lists {
  readonly id: string;
  readonly axes: readonly MemoryAxis[];
}

/** The dims of rows: sequence, position, expert. */
const rowDims = [0, 1, 2] as const;
const shardingIn = (b: Buffer, dim: number): readonly number[] => b.shardedBy[dim] ?? [];
const rowsOf = (b: Buffer): number => b.shape[0] ?? 0;

/** The exchange of ragged rows between the ranks of a group. */
export class RowExchange {
  readonly #emitter: Emitter;
  readonly #routes = new Map<string, Route>();

  constructor(emitter: Emitter) {
    this.#emitter = emitter;
  }

  /** Emits a reshard step of ragged rows. */
  exchange(i: Reshard, group: readonly BlockAxis[]): void {
    const emitter = this.#emitter;
    const r = this.#reshardOf(i, group);
    const { a, b, into, outOf, cap } = r;
    const route = this.#routeOf(r);
    const rows: MemoryAxis = { kind: "rows", size: cap };
    const [denseA, denseB] = [axesOf(emitter.mesh, a, i.blockAxes, 3), axesOf(emitter.mesh, b, i.blockAxes, 3)];
    let from = a.id;
    let have: readonly MemoryAxis[] = [rows, ...denseA];
    if (route.split !== undefined) {
      have = [...into, ...have];
      const width = countOf(denseA);
      from = emitter.temporary(`${i.id}.lists`, a.dtype, [countOf(into), cap, width]);
      emitter.compute({ op: takeRows, id: `${i.id}.take`, reads: { x: a.id, from: route.split }, writes: { y: from }, attrs: { width } });
    }
    if (route.merged === undefined) {
      invariant(rowsOf(b) === cap, () => `${i.id}: ${rowsOf(b)} rows where ${cap} arrive`);
      exchangeBlocks(emitter, { ...i, from }, { have, want: [rows, ...denseB], group });
      return;
    }
    const width = countOf(denseB);
    const to = emitter.temporary(`${i.id}.merged`, b.dtype, [countOf(outOf), cap, width]);
    exchangeBlocks(emitter, { ...i, from, to }, { have, want: [...outOf, rows, ...denseB], group });
    emitter.compute({ op: takeRows, id: `${i.id}.place`, reads: { x: to, from: route.merged }, writes: { y: b.id }, attrs: { width } });
  }

  #reshardOf(i: Reshard, group: readonly BlockAxis[]): RowReshard {
    const { mesh, rowsBound } = this.#emitter;
    const [a, b] = [this.#emitter.buffer(i.from), this.#emitter.buffer(i.to)];
    const shards = (of: Buffer) => group.filter(({ subAxis }) => rowDims.some((dim) => shardingIn(of, dim).includes(subAxis)));
    const into = shards(b);
    const shardedBy = rowDims.map((dim) => [...shardingIn(a, dim), ...shardingIn(b, dim).filter((f) => i.subAxes.includes(f))]);
    const cap = into.length ? boundOfRows(mesh, a, shardedBy, rowsBound) : rowsOf(a);
    return { i, a, b, group, into, outOf: shards(a), cap };
  }

  /** Returns the row maps between two layouts. Emits them, with the index of the second layout, once for all values with these rows. */
  #routeOf(r: RowReshard): Route {
    const { i, a, b } = r;
    const [from, to] = [a.rows, b.rows];
    invariant(from !== undefined && to !== undefined, () => `${i.id}: rows without an index`);
    const nameOf = (dest: string, source: string): string => `${dest}<${this.#emitter.layoutOf(source)}.${i.how}`;
    const name = nameOf(to, from);
    const known = this.#routes.get(name);
    if (known) return known;
    const route =
      from === to ? {} : (this.#inverse(r, name, to, this.#routes.get(nameOf(from, to))) ?? this.#newRoute(r, name, { from, to }));
    this.#routes.set(name, route);
    return route;
  }

  /** Emits the inverse of an earlier exchange, by which rows return to their old places. Returns undefined if there is none. */
  #inverse({ i, b, group, into, outOf, cap }: RowReshard, name: string, to: string, back: Route | undefined): Route | undefined {
    const emitter = this.#emitter;
    const isWhole = into.length === group.length && outOf.length === group.length;
    if (i.how !== "all_to_all" || !isWhole || back?.split === undefined || back.merged === undefined || !emitter.indexed.has(to))
      return undefined;
    const inverse = (map: string, id: string, length: number): string => {
      emitter.compute({ op: invertRows, id, reads: { from: map }, writes: { to: emitter.temporary(id, "i32", [length]) } });
      return id;
    };
    return {
      split: inverse(back.merged, `${name}.split`, countOf(into) * cap),
      merged: inverse(back.split, `${name}.merged`, rowsOf(b)),
    };
  }

  #newRoute(r: RowReshard, name: string, { from, to }: { readonly from: string; readonly to: string }): Route {
    const { b, into, outOf, cap } = r;
    const emitter = this.#emitter;
    let lists: Lists = { id: from, axes: [{ kind: "rows", size: emitter.lengthOf(from) }] };
    let split: string | undefined;
    if (into.length) {
      const length = 1 + 3 * cap;
      lists = { id: emitter.temporary(`${name}.lists`, "i32", [countOf(into), length]), axes: [...into, { kind: "rows", size: length }] };
      split = emitter.temporary(`${name}.split`, "i32", [countOf(into) * cap]);
      const writes = { lists: lists.id, from: split, ...emitter.overflow(`${name}.split`, cap) };
      const attrs = { cap, ...this.#destinations(r) };
      emitter.compute({ op: splitRows, id: `${name}.split`, reads: { index: from }, writes, attrs });
    }
    if (!outOf.length && emitter.indexed.has(to)) return { split };
    if (outOf.length) lists = this.#exchangeLists(r, name, lists);
    const merged = emitter.temporary(`${name}.merged`, "i32", [rowsOf(b)]);
    this.#merge(r, name, lists, { index: to, from: merged });
    emitter.indexed.add(to);
    return { split, merged: outOf.length ? merged : undefined };
  }

  /** Emits the exchange of index lists, like that of the rows. If no row changes its rank, this rank's own list is the index. */
  #exchangeLists({ i, group, into, outOf }: RowReshard, name: string, lists: Lists): Lists {
    const emitter = this.#emitter;
    const one = lists.axes.filter((a) => a.kind === "rows");
    const length = countOf(one);
    const received = emitter.temporary(`${name}.received`, "i32", [countOf(group), length]);
    const ends = { id: `${name}.exchange`, to: received, name: `${i.name}_index` };
    if (i.how === "all_to_all" && into.length) {
      const isInOrder = isSameMemory([...group, ...one], lists.axes);
      const sent = isInOrder ? lists.id : emitter.temporary(`${name}.sent`, "i32", [countOf(group), length]);
      if (!isInOrder) emitter.rearrange(`${name}.send`, lists.id, lists.axes, sent, [...group, ...one]);
      emitter.collective(i, "all_to_all", { ...ends, from: sent });
    } else emitter.collective(i, "all_gather", { ...ends, from: lists.id });
    const [have, want] = [
      [...group, ...one],
      [...outOf, ...one],
    ];
    if (isSameMemory(want, have)) return { id: received, axes: have };
    const kept = emitter.temporary(`${name}.kept`, "i32", [countOf(outOf), length]);
    emitter.rearrange(`${name}.keep`, received, have, kept, want);
    return { id: kept, axes: want };
  }

  #merge({ b, into, outOf, cap }: RowReshard, name: string, lists: Lists, writes: Readonly<Record<string, string>>): void {
    const length = countOf(lists.axes.filter((a) => a.kind === "rows"));
    const [B0 = 0, S0 = 0, experts = 0] = b.sizes;
    const blocks = outOf.length > 0 ? [] : into.map(({ subAxis }, n) => ({ subAxis, stride: countOf(into.slice(n + 1)) * length }));
    const bound = rowsOf(b);
    this.#emitter.compute({
      op: mergeRows,
      id: `${name}.merge`,
      reads: { lists: lists.id },
      writes: { ...writes, ...this.#emitter.overflow(`${name}.merge`, bound) },
      attrs: { count: countOf(outOf), length, cap, bound, B0, S0 },
      dims: { E: [experts, [...shardingIn(b, 2)]] },
      blocks,
    });
  }

  /** Returns the attributes from which `split_rows` computes the destination of a row from its coordinates. */
  #destinations({ i, b, into }: RowReshard): Record<string, number> {
    const { mesh } = this.#emitter;
    const terms = into.flatMap(({ subAxis, size }, n): [string, number][] => {
      const dim = rowDims.find((d) => shardingIn(b, d).includes(subAxis));
      invariant(dim !== undefined, () => `${i.id}: sub-axis ${subAxis} shards no dim of the rows`);
      const counted = i.blockAxes[dim] ?? [];
      const block = (b.sizes[dim] ?? 0) / shardCount(mesh, counted);
      const div = block * shardCount(mesh, counted.slice(counted.indexOf(subAxis) + 1));
      return [
        [`slot${n}`, dim],
        [`div${n}`, div],
        [`mod${n}`, size],
        [`mul${n}`, countOf(into.slice(n + 1))],
      ];
    });
    return Object.fromEntries(terms);
  }
}
