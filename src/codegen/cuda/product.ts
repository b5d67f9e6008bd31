/** The matrix products of six ops: which operands are a, b and c, their memory layout, and which sizes are ragged. */
import type { Dtype } from "../../../schemas/plan.ts";
import { invariant } from "../../ops/op.ts";
import { type KernelSpec, offsetsAt } from "../kernelSpec.ts";
import { type Float16, isFloat16 } from "./prelude.ts";

/** An operand. `depthFirst`: the dim that is summed over is contiguous; else the rows (of b: the columns) of c are. */
export interface Matrix {
  readonly name: string;
  readonly dtype: Dtype;
  readonly depthFirst: boolean;
}

/** c[m,n] = a[m,depth]·b[depth,n] per expert; ragged sizes are given at their bound over all experts. */
export interface CudaProduct {
  readonly a: Matrix;
  readonly b: Matrix;
  readonly c: { readonly name: string; readonly dtype: Dtype };
  readonly m: number;
  readonly n: number;
  readonly depth: number;
  /** Matrices of weights (ragged rows) or of c (ragged depth); 1 where nothing is ragged. */
  readonly experts: number;
  readonly ragged?: "rows" | "depth";
  /** Whether the product is added to c. */
  readonly adds: boolean;
  /** Index of the experts' first rows in the index buffer. */
  readonly offsets: number;
}

/** Returns the type of both operands if tensor cores support it. */
export const halfOf = ({ a, b }: Pick<CudaProduct, "a" | "b">): Float16 | undefined =>
  a.dtype === b.dtype && isFloat16(a.dtype) ? a.dtype : undefined;

/** The contiguous dim of an operand and the other dim. */
export const sidesOf = (p: CudaProduct, operand: "a" | "b"): readonly [number, number] => {
  const across = operand === "a" ? p.m : p.n;
  return p[operand].depthFirst ? [p.depth, across] : [across, p.depth];
};

/** Returns the largest number of tiles of c over all experts: the rows of each expert end in a separate tile. */
export function mostTiles(p: CudaProduct, rows: number, columns: number): number {
  const high = p.ragged === "rows" ? Math.min(p.m, Math.floor((p.m + p.experts * (rows - 1)) / rows)) : Math.ceil(p.m / rows);
  return high * Math.ceil(p.n / columns) * (p.ragged === "depth" ? p.experts : 1);
}

/** Operand names: forward x, w, y; dgrad dy, w, dx; wgrad x, dy, dw. */
export function productOf({ op, d, dtype, accumulates, bound }: KernelSpec): CudaProduct {
  const grouped = op.startsWith("grouped_");
  const rows = grouped ? bound : d.B! * d.S!;
  const matrix = (name: string, depthFirst: boolean): Matrix => ({ name, dtype: dtype[name]!, depthFirst });
  const product = (kind: "rows" | "depth", sizes: Pick<CudaProduct, "a" | "b" | "m" | "n" | "depth">, c: string): CudaProduct => ({
    ...sizes,
    c: { name: c, dtype: dtype[c]! },
    experts: grouped ? d.E! : 1,
    ...(grouped ? { ragged: kind } : {}),
    adds: accumulates.has(c),
    offsets: offsetsAt(bound),
  });
  const { K, N } = d as { K: number; N: number };
  switch (op.replace(/^grouped_|^gemm_/, "")) {
    case "gemm":
      return product("rows", { a: matrix("x", true), b: matrix("w", false), m: rows, n: N, depth: K }, "y");
    case "dgrad":
      return product("rows", { a: matrix("dy", true), b: matrix("w", true), m: rows, n: K, depth: N }, "dx");
    case "wgrad":
      return product("depth", { a: matrix("x", false), b: matrix("dy", false), m: K, n: N, depth: rows }, "dw");
    default:
      invariant(false, `${op} is no product`);
  }
}
