/** Fusion of products with the formulas that read them: swiglu with the product of its input, and its gradient with the input gradient after it. */
import { writesOf } from "../../../schemas/effects.ts";
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { FusedOpName } from "../../ops/index.ts";
import type { BufferUses } from "./bufferUses.ts";
import { canMove } from "./canMove.ts";

/** A formula of a product: its operand that is the product, the op of the product, and the op of both. */
interface Pair {
  readonly of: "up" | "dy";
  readonly product: string;
  readonly op: FusedOpName;
}
/** Pairs by the op of the formula. */
const pairs: Readonly<Record<string, Pair>> = {
  swiglu: { of: "up", product: "gemm", op: "gemm_swiglu" },
  swiglu_rows: { of: "up", product: "grouped_gemm", op: "grouped_gemm_swiglu" },
  swiglu_grad_again: { of: "dy", product: "gemm_dgrad", op: "gemm_dgrad_swiglu" },
  swiglu_rows_grad_again: { of: "dy", product: "grouped_dgrad", op: "grouped_dgrad_swiglu" },
};

/** Replaces a product and the formula that reads it by one instruction in the place of the formula. */
export function fuseEpilogues(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  // the index of the instruction that last wrote a buffer
  const writers = new Map<string, number>();
  const gone = new Set<Instruction>();
  const out = list.map((i, at) => {
    const pair = i.kind === "compute" ? pairs[i.op] : undefined;
    const start = i.kind === "compute" && pair ? (writers.get(i.reads[pair.of] ?? "") ?? at) : at;
    const product = list[start];
    const by =
      i.kind === "compute" && pair && product?.kind === "compute" ? fused(pair, i, product, list.slice(start + 1, at), uses) : undefined;
    if (by && product) gone.add(product);
    for (const id of writesOf(i, { get: (buffer) => uses.get(buffer) })) writers.set(id, at);
    return by ?? i;
  });
  return out.filter((i) => !gone.has(i));
}

/** Returns the instruction that replaces a product and a formula of it; undefined if they cannot be fused. */
function fused(
  { of, op, product: name }: Pair,
  i: Compute,
  product: Compute,
  between: readonly Instruction[],
  uses: BufferUses,
): Compute | undefined {
  if (product.op !== name || product.accumulates || product.ringOffset !== undefined || i.ringOffset !== undefined) return undefined;
  const { [of]: result, ...reads } = i.reads;
  const { w } = product.reads;
  const from = of === "up" ? product.reads.x : product.reads.dy;
  if (result === undefined || from === undefined || w === undefined || !canMove(product, between, uses)) return undefined;
  const { dtype } = uses.get(result);
  const isUniform = [from, w, reads.gate, reads.up].every((id) => id === undefined || uses.get(id).dtype === dtype);
  if (!isUniform) return undefined;
  if (of === "up") return { ...i, op, dims: product.dims, reads: { x: from, w, ...reads }, writes: { up: result, ...i.writes } };
  if (!uses.isBetweenTwo(result)) return undefined;
  uses.delete(result);
  return { ...i, op, dims: product.dims, reads: { dz: from, w, ...reads } };
}
