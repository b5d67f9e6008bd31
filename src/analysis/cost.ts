/** Costs of single instructions: rows of a ragged value, bytes of a collective, floating-point operations of an op. */

import { bytesOf } from "../../schemas/dtypes.ts";
import { accumulatesInto, pairsOf, readsOf } from "../../schemas/effects.ts";
import type { Buffer, Collective, CollectiveKind, Compute, Instruction } from "../../schemas/plan.ts";
import { elementsOf, shardCount } from "../../schemas/sharding.ts";
import { ops } from "../ops/index.ts";
import type { AnyOp, Quota } from "../ops/op.ts";
import type { Mesh } from "../passes/mesh.ts";
import type { BufferTable } from "./bufferTable.ts";

/** A ragged value [B,S,E,…] with its limits on rows: `fanout` per token (absent: all experts), `quota` per expert; the mean is fanout if absent. */
interface Rows {
  readonly sizes: readonly number[];
  readonly fanout?: number | undefined;
  readonly meanFanout?: number | undefined;
  readonly quota?: Quota | undefined;
}
/** Per dim, the sub-axes that shard it. */
type Sharding = readonly (readonly number[])[];

/** Returns the rows of a ragged value on one rank under balanced routing: min(B·S·mean fanout, capacity of all experts) / shards. */
function expectedRows(mesh: Mesh, { sizes, fanout = sizes[2] ?? 1, meanFanout: mean = fanout, quota }: Rows, shardedBy: Sharding): number {
  const [B = 1, S = 1, E = 1] = sizes;
  const room = quota ? (B / quota.sequences) * (S / quota.positions) * E * quota.rows : Infinity;
  return Math.min(B * S * mean, room) / shardCount(mesh, shardedBy.slice(0, 3).flat());
}

/**
 * Returns the largest number of rows of a ragged value on one rank. "worst": each token has rows at min(fanout, local experts) experts,
 * and no expert exceeds its quota. A number bounds this by `factor` × the balanced load.
 */
export function boundOfRows(mesh: Mesh, rows: Rows, shardedBy: Sharding, factor: "worst" | number): number {
  const [b = 1, s = 1, experts = 1] = rows.sizes.slice(0, 3).map((size, dim) => size / shardCount(mesh, shardedBy[dim] ?? []));
  const { quota, fanout = experts } = rows;
  const room = quota
    ? experts * Math.min(b * s, groupsTouched(b, quota.sequences) * groupsTouched(s, quota.positions) * quota.rows)
    : Infinity;
  const worst = Math.min(b * s * Math.min(fanout, experts), room);
  return factor === "worst" ? worst : Math.min(worst, Math.ceil(expectedRows(mesh, rows, shardedBy) * factor));
}
/** Returns the number of groups of `size` that a block of `n` overlaps. */
const groupsTouched = (n: number, size: number): number => (n % size === 0 ? n / size : size % n === 0 ? 1 : n);

/** Returns whether the sizes of a collective's buffers fit its kind. They are static: otherwise the host would wait for a count. */
export function sizesAgree(i: Collective, mesh: Mesh, buffer: (id: string) => Buffer): boolean {
  const { how, world, subAxes } = i;
  const members = world ? mesh.world : shardCount(mesh, subAxes);
  return pairsOf(i).every(({ from, to }) => {
    const [a, b] = [elementsOf(buffer(from).shape), elementsOf(buffer(to).shape)];
    if (how === "all_gather") return b === a * members;
    if (how === "reduce_scatter") return a === b * members;
    return a === b && (how !== "all_to_all" || a % members === 0);
  });
}

/** Returns the bytes that each of `n` ranks sends with ring algorithms. `from` and `to` are the local bytes before and after. */
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

/** Returns the operands that an instruction reads, in the order of the signature: a plan file sorts them by name. */
export const readsInOrder = ({ op, reads }: Compute): string[] => ops[op].inputs.flatMap(({ name }) => reads[name] ?? []);

/** Returns the floating-point operations of an instruction on one rank, with the expected number of rows. */
export function flopsOf(op: AnyOp, instruction: Compute, mesh: Mesh, buffer: (id: string) => Buffer): number {
  if (!op.flops) return 0;
  const d: Record<string, number> = { ...instruction.attrs };
  for (const [dim, [size, subAxes]] of Object.entries(instruction.dims)) d[dim] = size / shardCount(mesh, subAxes);
  const ragged = readsInOrder(instruction)
    .map(buffer)
    .find((b) => b.ragged);
  if (ragged) d.R = expectedRows(mesh, ragged, ragged.shardedBy);
  return op.flops(d);
}

/** What an instruction costs on one rank. */
export interface Cost {
  readonly flops: number;
  /** Bytes that an op reads and writes, outputs that it adds to twice; bytes that a collective or a transfer sends. */
  readonly bytes: number;
}

/** Returns the cost of an instruction, with the expected number of rows. */
export function costOf(i: Instruction, mesh: Mesh, buffers: BufferTable): Cost {
  if (i.kind !== "compute") return { flops: 0, bytes: i.bytes };
  const bytes = (id: string): number => {
    const b = buffers.get(id);
    const rows = b.ragged ? expectedRows(mesh, b, b.shardedBy) * elementsOf(b.shape.slice(1)) : elementsOf(b.shape);
    return bytesOf[b.dtype] * rows;
  };
  const touched = [...readsOf(i), ...Object.values(i.writes), ...accumulatesInto(i)];
  return { flops: flopsOf(ops[i.op], i, mesh, (id) => buffers.get(id)), bytes: touched.reduce((sum, id) => sum + bytes(id), 0) };
}
