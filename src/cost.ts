/** Costs of single instructions: rows and elements of a piece, bytes a move sends, floating-point operations of an op. */

import { elementsOf, parts } from "../schemas/layout.ts";
import type { Buffer, Compute, How, Move } from "../schemas/plan.ts";
import type { Mesh } from "./mesh.ts";
import type { AnyOp } from "./ops/op.ts";

/** Rows of a ragged piece [B,S,E,…] a rank holds when routing is balanced: B·S·k of its tokens, the share of its experts. */
export const expectedRows = (mesh: Mesh, sizes: readonly number[], cuts: readonly (readonly number[])[], fanout: number): number =>
  (sizes[0]! * sizes[1]! * fanout) / parts(mesh, cuts.slice(0, 3).flat());

/** The most rows a rank can get: every one of its tokens chooses as many of its experts as it may. Or `factor` times the balanced load. */
export function boundOfRows(
  mesh: Mesh,
  sizes: readonly number[],
  cuts: readonly (readonly number[])[],
  fanout: number,
  factor: "worst" | number,
): number {
  const tokens = (sizes[0]! * sizes[1]!) / parts(mesh, [...cuts[0]!, ...cuts[1]!]);
  const worst = tokens * Math.min(fanout, sizes[2]! / parts(mesh, cuts[2]!));
  return factor === "worst" ? worst : Math.min(worst, Math.ceil(expectedRows(mesh, sizes, cuts, fanout) * factor));
}

/** Whether a collective's buffers hold, at sizes known now, just what its kind takes and gives. If not, the host would have to wait for a count. */
export function sizesAgree({ how, world, factors, from, to }: Move, mesh: Mesh, buffer: (id: string) => Buffer): boolean {
  const members = world ? mesh.world : parts(mesh, factors);
  const [a, b] = [elementsOf(buffer(from).shape), elementsOf(buffer(to).shape)];
  if (how === "all_gather") return b === a * members;
  if (how === "reduce_scatter") return a === b * members;
  return a === b && (how !== "all_to_all" || a % members === 0);
}

/** Bytes each of n ranks sends, ring algorithms; `from` and `to` are the bytes of the piece before and after. */
export function bytesSent(how: How, n: number, from: number, to: number): number {
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
    default:
      return how satisfies never;
  }
}

/** Floating-point operations of one instruction on one rank; rows at their expected number. */
export function flopsOf(op: AnyOp, instruction: Compute, mesh: Mesh, buffer: (id: string) => Buffer): number {
  if (!op.flops) return 0;
  const d: Record<string, number> = { ...instruction.attrs };
  for (const [dim, [size, cut]] of Object.entries(instruction.dims)) d[dim] = size / parts(mesh, cut);
  const ragged = Object.values(instruction.reads)
    .map(buffer)
    .find((b) => b.ragged);
  if (ragged) d.R = expectedRows(mesh, ragged.sizes, ragged.cuts, ragged.fanout!);
  return op.flops(d);
}
