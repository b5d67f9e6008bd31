/**
 * Comm in one process: ranks are coroutines that meet at collectives. A collective sees only the pieces of its group and
 * gives each member the piece it asks for; what is missing in the group is an error. Sums run in rank order, so the same
 * plan gives the same bits.
 */
import { elementsOf, membersOf, rangesOf } from "../schemas/layout.ts";
import type { Buffer, Move, Plan } from "../schemas/plan.ts";
import type { Backend, Comm, HostData } from "./backend.ts";
import { rowsOverflow } from "./cpu.ts";

type Range = readonly [number, number];
/** Per dim in memory, the runs both sides hold: [start at source, start at destination, length]. */
type Runs = readonly (readonly [number, number, number])[][];

export function loopback(plan: Plan, backends: readonly Backend[]): Comm {
  const { mesh, programs } = plan;
  const buffers = programs.map((p) => new Map(p.buffers.map((b) => [b.id, b])));
  const stageOf = (rank: number) => Math.floor(rank / mesh.per_stage);
  const bufferOf = (rank: number, id: string): Buffer => buffers[stageOf(rank)]!.get(id)!;
  const waiting = new Map<string, Set<number>>();
  const done = new Map<string, Set<number>>();
  const mail = new Map<string, { data: HostData; rows: Int32Array | undefined }[]>();
  const runsOf = new Map<string, Runs>();

  const groupOf = (rank: number, i: Move): number[] => {
    if (i.world) return backends.map((_, r) => r);
    const base = stageOf(rank) * mesh.per_stage;
    return membersOf(mesh, rank - base, i.factors).map((m) => m + base);
  };
  const dims = (b: Buffer, radix: Move["radix"], rank: number, from: number): Range[][] =>
    b.sizes.slice(from).map((n, j) => rangesOf(mesh, n, b.cuts[from + j]!, radix[from + j] ?? b.cuts[from + j]!, rank % mesh.per_stage));

  /** A copy of the rows of a ragged piece. */
  const rowsAt = (rank: number, b: Buffer, slot: number): Int32Array | undefined =>
    b.rows ? (backends[rank]!.read(bufferOf(rank, b.rows), slot) as Int32Array).slice() : undefined;

  /** Where the dense dims of a destination piece lie in a source piece; the same in every step. */
  function runs(i: Move, source: number, target: number): Runs {
    const key = `${i.id}|${source}|${target}`;
    const known = runsOf.get(key);
    if (known) return known;
    const [a, b] = [bufferOf(source, i.from), bufferOf(target, i.to)];
    const [have, want] = [dims(a, i.radix, source, a.ragged), dims(b, i.radix, target, b.ragged)];
    const made = want.map((ranges, dim) => overlap(have[dim]!, ranges));
    runsOf.set(key, made);
    return made;
  }

  function perform(group: readonly number[], i: Move, slot: number): void {
    const held = group.map((rank) => {
      const b = bufferOf(rank, i.from);
      return { rank, b, rows: rowsAt(rank, b, slot), data: backends[rank]!.read(b, slot) };
    });
    const made = group.map((rank) => {
      const to = bufferOf(rank, i.to);
      const sources = i.how === "slice" ? held.filter((h) => h.rank === rank) : held;
      const data = to.dtype === "i32" ? new Int32Array(elementsOf(to.shape)) : new Float32Array(elementsOf(to.shape));
      if (i.how === "all_reduce_max") data.fill(Number.NEGATIVE_INFINITY);
      const reduce = i.how === "all_reduce" || i.how === "reduce_scatter" ? "sum" : i.how === "all_reduce_max" ? "max" : "copy";
      const rows = to.ragged ? rowsAfter(i, rank, to, sources) : undefined;
      let filled = 0;
      for (const s of sources) {
        const inner = runs(i, s.rank, rank);
        filled += copy(data, s.data, rows ? [matchRows(s.rows!, rows, to), ...inner] : inner, s.b.shape, to.shape, reduce);
      }
      const expected = (rows ? rows[0]! * elementsOf(shapeOf(to)) : data.length) * (reduce === "copy" ? 1 : sources.length);
      if (filled !== expected) throw new Error(`rankc: ${i.id}, rank ${rank}: ${filled} of ${expected} elements were found in the group`);
      return { rank, to, data, rows };
    });
    // written last: a reduction in place reads and writes the same bytes
    for (const { rank, to, data, rows } of made) {
      backends[rank]!.write(to, slot, data);
      if (rows) backends[rank]!.write(bufferOf(rank, to.rows!), slot, rows);
    }
  }

  /** The rows a rank holds after a move: all rows of the group that fall into its part of B, S and E. */
  function rowsAfter(i: Move, rank: number, to: Buffer, sources: readonly { rows: Int32Array | undefined }[]): Int32Array {
    const mine = [0, 1, 2].map((slot) => rangesOf(mesh, to.sizes[slot]!, to.cuts[slot]!, i.radix[slot]!, rank % mesh.per_stage));
    const inside = (slot: number, x: number) => mine[slot]!.some(([a, b]) => a <= x && x < b);
    const moved = i.factors.flatMap((f) => to.cuts.findIndex((c, slot) => slot < 3 && c.includes(f))).filter((slot) => slot >= 0);
    const found = new Map<number, [number, number, number]>();
    for (const { rows } of sources)
      for (let r = 0; r < rows![0]!; r++) {
        const at: [number, number, number] = [rows![1 + 3 * r]!, rows![2 + 3 * r]!, rows![3 + 3 * r]!];
        if (moved.every((slot) => inside(slot, at[slot]!))) found.set(keyOf(to, ...at), at);
      }
    const bound = to.shape[0]!;
    if (found.size > bound) throw rowsOverflow(i.id, rank, found.size, bound);
    const out = new Int32Array(1 + 3 * bound);
    out[0] = found.size;
    for (const [n, [, at]] of [...found].sort((x, y) => x[0] - y[0]).entries()) out.set(at, 1 + 3 * n);
    return out;
  }

  return {
    move(rank, i, at) {
      const group = i.how === "slice" ? [rank] : groupOf(rank, i);
      const key = `${i.id}|${at.tag}|${i.world ? "world" : stageOf(rank)}|${group[0]}`;
      const ready = done.get(key);
      if (ready?.delete(rank)) {
        if (ready.size === 0) done.delete(key);
        return true;
      }
      const here = (waiting.get(key) ?? new Set()).add(rank);
      waiting.set(key, here);
      if (here.size < group.length) return false;
      waiting.delete(key);
      perform(group, i, at.slot);
      if (group.length > 1) done.set(key, new Set(group.filter((r) => r !== rank)));
      return true;
    },
    send(rank, i, at) {
      const b = bufferOf(rank, i.buffer);
      const peer = i.peer * mesh.per_stage + (rank % mesh.per_stage);
      const key = `${rank}>${peer}|${i.tag}|${at.tag}`;
      mail.set(key, [...(mail.get(key) ?? []), { data: backends[rank]!.read(b, at.slot).slice(), rows: rowsAt(rank, b, at.slot) }]);
    },
    recv(rank, i, at) {
      const peer = i.peer * mesh.per_stage + (rank % mesh.per_stage);
      const key = `${peer}>${rank}|${i.tag}|${at.tag}`;
      const letter = mail.get(key)?.shift();
      if (!letter) return false;
      if (!mail.get(key)!.length) mail.delete(key);
      const b = bufferOf(rank, i.buffer);
      backends[rank]!.write(b, at.slot, letter.data);
      if (letter.rows) backends[rank]!.write(bufferOf(rank, b.rows!), at.slot, letter.rows);
      return true;
    },
  };
}

/** The dense dims in memory. */
const shapeOf = (b: Buffer): readonly number[] => b.shape.slice(b.ragged ? 1 : 0);
/** Rows are ordered by expert, then sequence, then position. */
const keyOf = (b: Buffer, row: number, s: number, e: number) => (e * b.sizes[0]! + row) * b.sizes[1]! + s;

/** Runs of rows that both sides hold, in the order of both. */
function matchRows(source: Int32Array, target: Int32Array, b: Buffer): [number, number, number][] {
  const at = new Map<number, number>();
  for (let r = 0; r < source[0]!; r++) at.set(keyOf(b, source[1 + 3 * r]!, source[2 + 3 * r]!, source[3 + 3 * r]!), r);
  const found: [number, number, number][] = [];
  for (let r = 0; r < target[0]!; r++) {
    const from = at.get(keyOf(b, target[1 + 3 * r]!, target[2 + 3 * r]!, target[3 + 3 * r]!));
    if (from === undefined) continue;
    const last = found.at(-1);
    if (last && last[0] + last[2] === from && last[1] + last[2] === r) last[2]++;
    else found.push([from, r, 1]);
  }
  return found;
}

function overlap(have: readonly Range[], want: readonly Range[]): [number, number, number][] {
  const runs: [number, number, number][] = [];
  let to = 0;
  for (const [a, b] of want) {
    let from = 0;
    for (const [c, d] of have) {
      const start = Math.max(a, c);
      const stop = Math.min(b, d);
      if (start < stop) runs.push([from + start - c, to + start - a, stop - start]);
      from += d - c;
    }
    to += b - a;
  }
  return runs;
}

/** Copies (or adds, or takes the larger of) the overlapping block of two row-major pieces; the number of elements touched. */
function copy(
  out: HostData,
  from: HostData,
  runs: Runs,
  shapeFrom: readonly number[],
  shapeTo: readonly number[],
  reduce: "copy" | "sum" | "max",
): number {
  const strides = (shape: readonly number[]) => shape.map((_, i) => elementsOf(shape.slice(i + 1)));
  const [sf, st] = [strides(shapeFrom), strides(shapeTo)];
  let touched = 0;
  const run = (a: number, b: number, n: number) => {
    touched += n;
    if (reduce === "copy") out.set(from.subarray(a, a + n), b);
    else if (reduce === "sum") for (let i = 0; i < n; i++) out[b + i]! += from[a + i]!;
    else for (let i = 0; i < n; i++) out[b + i] = Math.max(out[b + i]!, from[a + i]!);
  };
  const visit = (dim: number, a: number, b: number) => {
    if (dim === runs.length) return run(a, b, 1);
    const last = dim === runs.length - 1;
    for (const [x, y, n] of runs[dim]!) {
      if (last) run(a + x, b + y, n);
      else for (let i = 0; i < n; i++) visit(dim + 1, a + (x + i) * sf[dim]!, b + (y + i) * st[dim]!);
    }
  };
  visit(0, 0, 0);
  return touched;
}
