/** Costs of single instructions: rows and elements of a piece, bytes a move sends, floating-point operations of an op. */

import type { Buffer, Collective, CollectiveKind, Compute } from "../../schemas/plan.ts";
import { elementsOf, shardCount } from "../../schemas/sharding.ts";
import type { AnyOp, Quota } from "../ops/op.ts";
import type { Mesh } from "../passes/mesh.ts";

/** A ragged value [B,S,E,…], and how many rows it may have: per token, and per expert. */
interface Rows {
  readonly sizes: readonly number[];
  readonly fanout?: number | undefined;
  readonly quota?: Quota | undefined;
}
type Cuts = readonly (readonly number[])[];

/** Rows of a ragged piece a rank holds when routing is balanced: B·S·k of its tokens or what experts have room for, the share of its experts. */
export function expectedRows(mesh: Mesh, { sizes, fanout, quota }: Rows, shardedBy: Cuts): number {
  const [B, S, E] = sizes as readonly [number, number, number];
  const room = quota ? (B / quota.sequences) * (S / quota.positions) * E * quota.rows : Infinity;
  return Math.min(B * S * fanout!, room) / shardCount(mesh, shardedBy.slice(0, 3).flat());
}

/**
 * The most rows a rank can get: every one of its tokens goes to as many of its experts as it may, and no expert beyond its quota of any
 * group of tokens. Or `factor` times the balanced load.
 */
export function boundOfRows(mesh: Mesh, rows: Rows, shardedBy: Cuts, factor: "worst" | number): number {
  const [b, s, experts] = [0, 1, 2].map((slot) => rows.sizes[slot]! / shardCount(mesh, shardedBy[slot]!)) as [number, number, number];
  const { quota } = rows;
  const room = quota ? experts * Math.min(b * s, touched(b, quota.sequences) * touched(s, quota.positions) * quota.rows) : Infinity;
  const worst = Math.min(b * s * Math.min(rows.fanout!, experts), room);
  return factor === "worst" ? worst : Math.min(worst, Math.ceil(expectedRows(mesh, rows, shardedBy) * factor));
}
/** How many groups of `size` a piece of `n` may lie in. */
const touched = (n: number, size: number): number => (n % size === 0 ? n / size : size % n === 0 ? 1 : n);

/** Whether a collective's buffers hold, at sizes known now, just what its kind takes and gives. If not, the host would have to wait for a count. */
export function sizesAgree({ how, world, subAxes, from, to }: Collective, mesh: Mesh, buffer: (id: string) => Buffer): boolean {
  const members = world ? mesh.world : shardCount(mesh, subAxes);
  const [a, b] = [elementsOf(buffer(from).shape), elementsOf(buffer(to).shape)];
  if (how === "all_gather") return b === a * members;
  if (how === "reduce_scatter") return a === b * members;
  return a === b && (how !== "all_to_all" || a % members === 0);
}

/** Bytes each of n ranks sends, ring algorithms; `from` and `to` are the bytes of the piece before and after. */
export function bytesSent(how: CollectiveKind, n: number, from: number, to: number): number {
  const share = (n - 1) / n;
  switch (how) {
    case "all_gather":
      return Math.round(to * share);
    case "reduce_scatter":
    case "all_to_all":
      return Math.round(from * share);
    case "all_reduce":
    case "all_reduce_max":
      return Math.round(2 * from * share);
    case "shift":
      return n > 1 ? from : 0;
    default:
      return how satisfies never;
  }
}

/** Floating-point operations of one instruction on one rank; rows at their expected number. */
export function flopsOf(op: AnyOp, instruction: Compute, mesh: Mesh, buffer: (id: string) => Buffer): number {
  if (!op.flops) return 0;
  const d: Record<string, number> = { ...instruction.attrs };
  for (const [dim, [size, subAxes]] of Object.entries(instruction.dims)) d[dim] = size / shardCount(mesh, subAxes);
  const ragged = Object.values(instruction.reads)
    .map(buffer)
    .find((b) => b.ragged);
  if (ragged) d.R = expectedRows(mesh, ragged, ragged.shardedBy);
  return op.flops(d);
}
