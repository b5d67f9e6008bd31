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

/** Returns the largest number of tiles of c over all experts: the rows of each expert end in a separate tile. */
export function mostTiles(p: MatrixProduct, rows: number, columns: number): number {
  const high = p.ragged === "rows" ? Math.min(p.m, Math.floor((p.m + p.experts * (rows - 1)) / rows)) : Math.ceil(p.m / rows);
  return high * Math.ceil(p.n / columns) * (p.ragged === "depth" ? p.experts : 1);
}
