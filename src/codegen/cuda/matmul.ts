/** Tiles and operand types of matrix products on CUDA. */

import { type Float16, isFloat16 } from "../../../schemas/dtypes.ts";
import type { MatrixProduct } from "../matmul.ts";

/** Returns the type of both operands if tensor cores support it. */
export const halfOf = ({ a, b }: Pick<MatrixProduct, "a" | "b">): Float16 | undefined =>
  a.dtype === b.dtype && isFloat16(a.dtype) ? a.dtype : undefined;

/** The contiguous dim of an operand and the other dim. */
export const sidesOf = (p: MatrixProduct, operand: "a" | "b"): readonly [number, number] => {
  const across = operand === "a" ? p.m : p.n;
  return p[operand].depthFirst ? [p.depth, across] : [across, p.depth];
};

/** Returns the largest number of tiles of c (and of that of its twin) over all experts: the rows of each expert end in a separate tile. */
export function mostTiles(p: MatrixProduct, rows: number, columns: number): number {
  const high = p.ragged === "rows" ? Math.min(p.m, Math.floor((p.m + p.experts * (rows - 1)) / rows)) : Math.ceil(p.m / rows);
  return high * Math.ceil(p.n / columns) * (p.ragged === "depth" ? p.experts : 1) * (p.twin ? 2 : 1);
}

/** An addend of a sum of products. */
export interface Addend extends MatrixProduct {
  /** Where it begins in the depth of all, in elements, and where it ends: both are multiples of the depth of a step. */
  readonly from: number;
  readonly end: number;
}
/** Returns the addends of a product, one if it is no sum, and the depth of all. Beyond its own depth an addend reads zeros. */
export function addendsOf(p: MatrixProduct, step: number): { readonly addends: readonly Addend[]; readonly depth: number } {
  let end = 0;
  const addends = (p.addends ?? [p]).map((a) => {
    const from = end;
    end += Math.ceil(a.depth / step) * step;
    return { ...a, from, end };
  });
  return { addends, depth: p.addends ? end : p.depth };
}
/** Returns the operands of the addends after the first as templates name them: `a1`, `b1`, `a2`, … */
export const moreOperands = (addends: readonly Addend[]) =>
  addends.slice(1).map(({ from, end, depth }, i) => ({ a: `a${i + 1}`, b: `b${i + 1}`, from, end, depth }));
