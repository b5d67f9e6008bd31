/**
 * Lowering of reshard steps to raw collectives. After this pass a reshard step is one collective on contiguous buffers
 * (runtime/backend.ts, `Comm`), with ops before and after it that arrange blocks. A sharded value is described by its axes in memory:
 * per dim the sub-axes that do not shard it, then the local block. Ragged rows travel in lists of a fixed capacity, each with its
 * index, because the number of rows is known on the device only.
 */

import type { Buffer, CollectiveKind, Compute, Dtype, Instruction } from "../../schemas/plan.ts";
import { bytesOf, elementsOf, shardCount } from "../../schemas/sharding.ts";
import { boundOfRows, bytesSent } from "../analysis/cost.ts";
import { type AnyOp, invariant } from "../ops/op.ts";
import { arrange, invertRows, mergeRows, splitRows, takeRows } from "../ops/transport.ts";
import type { BlockBuilder, ProgramBuilder, Reshard } from "./programBuilder.ts";

/** One axis of a sharded value in memory: a sub-axis within a dim, the local block of a dim, or a list of rows. */
interface Axis {
  readonly key: string;
  readonly size: number;
  readonly factor?: number;
}
const subAxisKey = (f: number): string => `sub-axis ${f}`;
const dimKey = (dim: number): string => `dim ${dim}`;
const ROWS = "rows";

/** The buffers that map the rows of one index to the rows of another. */
interface Route {
  /** Row map of the lists by destination, [lists · cap]; absent if rows are not split by destination. */
  readonly split?: string;
  /** Row map of the merged lists; absent if received lists are not merged. */
  readonly merged?: string;
}

/** Returns the blocks of a stage with raw collectives in place of reshard steps; forward and backward by chunk. Adds temporary buffers. */
export function lowerCollectives(role: ProgramBuilder): { forward: Instruction[][]; backward: Instruction[][]; step: Instruction[] } {
  const { mesh, buffers, blocks, job } = role;
  const bound = job.model.moe?.rows_bound ?? "worst";
  const routes = new Map<string, Route>();
  /** Index buffers that an instruction has written. The place of a row depends on routing and sharding only. */
  const indexed = new Set<string>();
  let out: Instruction[] = [];

  /** Removes the index output of all but the first op of one routing: they share the index. */
  function indexOnce(i: Compute): Compute {
    if (!i.rows) return i;
    const { rows, ...rest } = i;
    if (indexed.has(rows)) return rest;
    indexed.add(rows);
    const ragged = Object.values(i.writes).find((id) => buffers.get(id)!.ragged)!;
    if (bound !== "worst") role.needed(rows, buffers.get(ragged)!.shape[0]!);
    return i;
  }

  const temporary = (id: string, dtype: Dtype, shape: readonly number[]): string =>
    role.add({ id, kind: "workspace", dtype, shape: [...shape], sizes: [...shape], ragged: 0, shardedBy: shape.map(() => []) });
  const lengthOf = (id: string): number => elementsOf(buffers.get(id)!.shape);

  function compute(
    op: AnyOp,
    id: string,
    reads: Record<string, string>,
    writes: Record<string, string>,
    attrs: Record<string, number>,
    own: Compute["dims"] = {},
  ): void {
    const dims: Compute["dims"] = { ...own };
    for (const [operands, named] of [
      [op.inputs, reads],
      [op.outputs, writes],
    ] as const)
      for (const o of operands) {
        const dim = o.dimSpecs[0]?.dim;
        if (dim && named[o.name]) dims[dim] = [lengthOf(named[o.name]!), []];
      }
    const accumulates = op.inPlace?.filter((name) => writes[name]);
    out.push({
      kind: "compute",
      id,
      op: op.name,
      kernel: "",
      reads,
      writes,
      dims,
      attrs,
      ...(accumulates?.length ? { accumulates: [...accumulates] } : {}),
    });
  }

  /** Copies a buffer into other axes. An axis that `have` lacks is repeated; along the sub-axes in `pick` only this rank's block is read. */
  function rearrange(
    id: string,
    from: string,
    have: readonly Axis[],
    to: string,
    want: readonly Axis[],
    pick: readonly number[] = [],
  ): void {
    const stride = new Map<string, number>();
    let step = 1;
    for (const a of have.toReversed()) {
      stride.set(a.key, step);
      step *= a.size;
    }
    const dims: { n: number; s: number }[] = [];
    for (const a of want) {
      if (a.size === 1) continue;
      const s = stride.get(a.key) ?? 0;
      const last = dims.at(-1);
      if (last && last.s === s * a.size) dims[dims.length - 1] = { n: last.n * a.size, s };
      else dims.push({ n: a.size, s });
    }
    if (!dims.length) dims.push({ n: 1, s: 1 });
    const attrs = Object.fromEntries(dims.flatMap(({ n, s }, j) => [[`n${j}`, n] as const, [`s${j}`, s] as const]));
    const at: Compute["dims"] = {};
    for (const [j, f] of pick.entries()) at[`@${j}`] = [stride.get(subAxisKey(f))! * mesh.subAxes[f]!.size, [f]];
    compute(arrange, id, { x: from }, { y: to }, attrs, at);
  }

  /** Returns whether two lists of axes describe the same memory. */
  const sameMemory = (a: readonly Axis[], b: readonly Axis[]): boolean => {
    const real = (axes: readonly Axis[]) => axes.filter((x) => x.size > 1).map((x) => x.key);
    return real(a).join() === real(b).join();
  };
  const countOf = (axes: readonly Axis[]): number => axes.reduce((n, a) => n * a.size, 1);
  const subAxisDims = (fs: readonly number[]): Axis[] => fs.map((f) => ({ key: subAxisKey(f), size: mesh.subAxes[f]!.size, factor: f }));

  /** Returns the axes in memory of a buffer, from dim `first` on. */
  function axesOf(b: Buffer, blockAxes: Reshard["blockAxes"], first: number): Axis[] {
    return b.sizes.flatMap((n, slot) => {
      if (slot < first) return [];
      const counted = blockAxes[slot] ?? b.shardedBy[slot]!;
      const left = counted.filter((f) => !b.shardedBy[slot]!.includes(f));
      return [...subAxisDims(left), { key: dimKey(slot), size: n / shardCount(mesh, counted) }];
    });
  }

  /** Emits the collective of a reshard step, between contiguous buffers. */
  function raw(i: Reshard, id: string, from: string, to: string, name = i.name): void {
    const bytes = (b: string) => bytesOf[buffers.get(b)!.dtype] * lengthOf(b);
    const how = i.how as CollectiveKind; // slices and regrids are copies: they never reach this function
    const sent = bytesSent(how, i.world ? mesh.world : shardCount(mesh, i.subAxes), bytes(from), bytes(to));
    const { blockAxes: _, ...rest } = i;
    out.push({ ...rest, kind: "collective", how, id, name, from, to, bytes: sent });
  }

  function expand(i: Reshard): void {
    const [a, b] = [buffers.get(i.from)!, buffers.get(i.to)!];
    if (i.how === "all_reduce" || i.how === "all_reduce_max") {
      raw(i, i.id, i.from, i.to);
      return;
    }
    // members of a group are in ascending order of rank: the sub-axis with the largest stride is the outermost
    const group = subAxisDims([...i.subAxes].sort((f, g) => mesh.subAxes[g]!.stride - mesh.subAxes[f]!.stride));
    if (a.ragged) expandRows(i, a, b, group);
    else exchange(i, axesOf(a, i.blockAxes, 0), axesOf(b, i.blockAxes, 0), group);
  }

  /** Emits a dense reshard step: pack, collective, unpack. A copy is left out where the axes are in the right order already. */
  function exchange(i: Reshard, have: readonly Axis[], want: readonly Axis[], group: readonly Axis[]): void {
    const [a, b] = [buffers.get(i.from)!, buffers.get(i.to)!];
    const moved = new Set(group.map((g) => g.key));
    const rest = have.filter((x) => !moved.has(x.key));
    switch (i.how) {
      case "slice":
      case "regrid":
        rearrange(i.id, a.id, have, b.id, want, i.subAxes);
        return;
      case "all_gather": {
        const received = [...group, ...have];
        const blocks = sameMemory(received, want) ? b.id : temporary(`${i.id}.blocks`, a.dtype, [countOf(group), countOf(have)]);
        raw(i, i.id, a.id, blocks);
        if (blocks !== b.id) rearrange(`${i.id}.unpack`, blocks, received, b.id, want);
        return;
      }
      case "reduce_scatter": {
        const sent = [...group, ...want];
        const packed = sameMemory(sent, have) ? a.id : temporary(`${i.id}.blocks`, a.dtype, [countOf(group), countOf(want)]);
        if (packed !== a.id) rearrange(`${i.id}.pack`, a.id, have, packed, sent);
        // a result in the bytes of its source would overwrite blocks that other ranks have yet to read
        const own = packed === a.id && b.within ? temporary(`${i.id}.own`, b.dtype, [countOf(want)]) : b.id;
        raw(i, i.id, packed, own);
        if (own !== b.id) rearrange(`${i.id}.keep`, own, want, b.id, want);
        return;
      }
      case "all_to_all": {
        const blocks = [...group, ...rest];
        const shape = [countOf(group), countOf(rest)];
        const sent = sameMemory(blocks, have) ? a.id : temporary(`${i.id}.sent`, a.dtype, shape);
        if (sent !== a.id) rearrange(`${i.id}.pack`, a.id, have, sent, blocks);
        const received = sameMemory(blocks, want) ? b.id : temporary(`${i.id}.received`, a.dtype, shape);
        raw(i, i.id, sent, received);
        if (received !== b.id) rearrange(`${i.id}.unpack`, received, blocks, b.id, want);
        return;
      }
      default:
        throw new Error(`rankc: ${i.how} does not exchange blocks`);
    }
  }

  /** Emits a reshard step of ragged rows: split by destination, pack into lists of a fixed capacity, exchange, merge in order. */
  function expandRows(i: Reshard, a: Buffer, b: Buffer, group: readonly Axis[]): void {
    const subAxesIn = (shardedBy: Buffer["shardedBy"]) => i.subAxes.filter((f) => shardedBy.slice(0, 3).some((c) => c.includes(f)));
    const order = (fs: readonly number[]): Axis[] => group.filter((g) => fs.includes(g.factor!));
    const into = order(subAxesIn(b.shardedBy));
    const outOf = order(subAxesIn(a.shardedBy));
    const shardedBy = [0, 1, 2].map((slot) => [...a.shardedBy[slot]!, ...b.shardedBy[slot]!.filter((f) => i.subAxes.includes(f))]);
    const cap = into.length ? boundOfRows(mesh, a, shardedBy, bound) : a.shape[0]!;
    const route = routeOf(i, a, b, { into, outOf, group, cap });

    const rows: Axis = { key: ROWS, size: cap };
    const [denseA, denseB] = [axesOf(a, i.blockAxes, 3), axesOf(b, i.blockAxes, 3)];
    let from = a.id;
    let have: Axis[] = [rows, ...denseA];
    if (route.split) {
      have = [...into, ...have];
      from = temporary(`${i.id}.lists`, a.dtype, [countOf(into), cap, countOf(denseA)]);
      compute(takeRows, `${i.id}.take`, { x: a.id, from: route.split }, { y: from }, { width: countOf(denseA) });
    }
    const merged = route.merged !== undefined;
    const want: Axis[] = merged ? [...outOf, rows, ...denseB] : [rows, ...denseB];
    invariant(merged || b.shape[0] === cap, `${i.id}: ${b.shape[0]} rows where ${cap} arrive`);
    const to = merged ? temporary(`${i.id}.merged`, b.dtype, [countOf(outOf), cap, countOf(denseB)]) : b.id;
    exchange({ ...i, from, to }, have, want, group);
    if (merged) compute(takeRows, `${i.id}.place`, { x: to, from: route.merged! }, { y: b.id }, { width: countOf(denseB) });
  }

  /** Arguments of `routeOf`: axes that rows are sent along and received from, the group, and the capacity of a list in rows. */
  interface Lists {
    readonly into: readonly Axis[];
    readonly outOf: readonly Axis[];
    readonly group: readonly Axis[];
    readonly cap: number;
  }
  /** Emits the row maps between two layouts and the index of the second, once for all values with these rows. Returns the maps. */
  function routeOf(i: Reshard, a: Buffer, b: Buffer, { into, outOf, group, cap }: Lists): Route {
    const [from, to] = [a.rows!, b.rows!];
    const nameOf = (dest: string, source: string): string => `${dest}<${source.slice(source.lastIndexOf("@"))}.${i.how}`;
    const name = nameOf(to, from);
    const known = routes.get(name);
    if (known) return known;
    const save = (route: Route): Route => {
      routes.set(name, route);
      return route;
    };
    if (from === to) return save({});
    const back = routes.get(nameOf(from, to));
    const all = into.length === group.length && outOf.length === group.length;
    if (i.how === "all_to_all" && all && back?.split && back.merged && indexed.has(to)) {
      // the inverse of an earlier exchange: rows return to their old places
      const inverse = (map: string, id: string, length: number): string => {
        compute(invertRows, id, { from: map }, { to: temporary(id, "i32", [length]) }, {});
        return id;
      };
      return save({
        split: inverse(back.merged, `${name}.split`, countOf(into) * cap),
        merged: inverse(back.split, `${name}.merged`, b.shape[0]!),
      });
    }

    const overflow = (id: string, most: number): Record<string, string> => (bound === "worst" ? {} : { needed: role.needed(id, most) });
    let lists = from;
    let length = lengthOf(from);
    let split: string | undefined;
    if (into.length) {
      length = 1 + 3 * cap;
      lists = temporary(`${name}.lists`, "i32", [countOf(into), length]);
      split = temporary(`${name}.split`, "i32", [countOf(into) * cap]);
      compute(
        splitRows,
        `${name}.split`,
        { index: from },
        { lists, from: split, ...overflow(`${name}.split`, cap) },
        { cap, ...destinations(i, b, into) },
      );
    }
    if (!outOf.length && indexed.has(to)) return save({ ...(split ? { split } : {}) });
    // index lists are exchanged like the rows; if no row changes its rank, this rank's own list is the index
    const one: Axis = { key: ROWS, size: length };
    let have: readonly Axis[] = [...into, one];
    if (outOf.length) {
      const received = temporary(`${name}.received`, "i32", [countOf(group), length]);
      if (i.how === "all_to_all" && into.length) {
        const sent = sameMemory([...group, one], have) ? lists : temporary(`${name}.sent`, "i32", [countOf(group), length]);
        if (sent !== lists) rearrange(`${name}.send`, lists, have, sent, [...group, one]);
        raw(i, `${name}.exchange`, sent, received, `${i.name}_index`);
      } else raw({ ...i, how: "all_gather" }, `${name}.exchange`, lists, received, `${i.name}_index`);
      lists = received;
      have = [...group, one];
      if (!sameMemory([...outOf, one], have)) {
        lists = temporary(`${name}.kept`, "i32", [countOf(outOf), length]);
        rearrange(`${name}.keep`, received, have, lists, [...outOf, one]);
      }
    }
    const merged = temporary(`${name}.merged`, "i32", [b.shape[0]!]);
    const dims: Compute["dims"] = { E: [b.sizes[2]!, [...b.shardedBy[2]!]] };
    if (!outOf.length) for (const [j, x] of into.entries()) dims[`@${j}`] = [countOf(into.slice(j + 1)) * length * x.size, [x.factor!]];
    compute(
      mergeRows,
      `${name}.merge`,
      { lists },
      { index: to, from: merged, ...overflow(`${name}.merge`, b.shape[0]!) },
      { count: countOf(outOf), length, cap, bound: b.shape[0]!, B0: b.sizes[0]!, S0: b.sizes[1]! },
      dims,
    );
    indexed.add(to);
    return save({ ...(split ? { split } : {}), ...(outOf.length ? { merged } : {}) });
  }

  /** Returns the attributes from which `split_rows` computes the destination of a row from its coordinates. */
  function destinations(i: Reshard, b: Buffer, into: readonly Axis[]): Record<string, number> {
    return Object.fromEntries(
      into.flatMap((axis, n) => {
        const slot = [0, 1, 2].find((s) => b.shardedBy[s]!.includes(axis.factor!))!;
        const counted = i.blockAxes[slot]!;
        const at = counted.indexOf(axis.factor!);
        const block = b.sizes[slot]! / shardCount(mesh, counted);
        const div = block * shardCount(mesh, counted.slice(at + 1));
        return [
          [`slot${n}`, slot],
          [`div${n}`, div],
          [`mod${n}`, axis.size],
          [`mul${n}`, countOf(into.slice(n + 1))],
        ] as [string, number][];
      }),
    );
  }

  function expandBlock({ list }: BlockBuilder): Instruction[] {
    out = [];
    for (const i of list) {
      if (i.kind === "reshard") expand(i);
      else out.push(i.kind === "compute" ? indexOnce(i) : i);
    }
    return out;
  }
  // forward first: backward reuses its routes in the opposite direction
  return { forward: blocks.forward.map(expandBlock), backward: blocks.backward.map(expandBlock), step: expandBlock(blocks.step) };
}
