import type { Dtype } from "../../schemas/dtypes.ts";
import {
  gemmDgradPair,
  gemmDgradSwiglu,
  gemmDgradTriple,
  gemmPair,
  gemmSwiglu,
  gemmWgradPair,
  groupedDgradPair,
  groupedDgradSwiglu,
  groupedGemmSwiglu,
  groupedWgradPair,
  swigluGradAgain,
  swigluRowsGradAgain,
} from "../ops/fused.ts";
import { gatedUnits } from "../ops/gatedUnits.ts";
import { gemm, gemmDgrad, gemmWgrad, groupedDgrad, groupedGemm, groupedWgrad } from "../ops/gemm.ts";
import { type AnyFormulaOp, invariant } from "../ops/op.ts";
import { forOp, type KernelSpec, offsetsAt } from "./kernelSpec.ts";

/** An operand. `depthFirst`: the dim that is summed over is contiguous; else the rows (of b: the columns) of c are. */
export interface Matrix {
  readonly name: string;
  readonly dtype: Dtype;
  readonly depthFirst: boolean;
}

/** c[m,n] = a[m,depth]·b[depth,n] per expert; ragged sizes are given at their bound over all experts. */
export interface MatrixProduct {
  readonly a: Matrix;
  readonly b: Matrix;
  readonly c: { readonly name: string; readonly dtype: Dtype };
  readonly m: number;
  readonly n: number;
  readonly depth: number;
  /** Matrices of weights (ragged rows) or of c (ragged depth); 1 if nothing is ragged. */
  readonly experts: number;
  readonly ragged?: "rows" | "depth";
  /** The products of which c is the sum, if they are several: they differ in a, b and depth alone, and `depth` is that of all. */
  readonly addends?: readonly MatrixProduct[];
  readonly epilogue?: Epilogue;
  /** A second product of the same a, with a b and a c of its own. */
  readonly twin?: Pick<MatrixProduct, "b" | "c" | "n">;
  /** Operands, which are f32, are rounded to TF32. */
  readonly tf32?: true;
  /** Whether the product is added to c. */
  readonly adds: boolean;
  /** Index of the experts' first rows in the index buffer. */
  readonly offsets: number;
}

/** A formula with c as one operand, whose results are stored. Its other operands have the names of those of the spec. */
export interface Epilogue {
  readonly formula: AnyFormulaOp;
  /** Whether c is stored too. */
  readonly storesProduct: boolean;
}

/** The size of a product over tokens, or over the rows of experts. */
type Extent = Pick<MatrixProduct, "experts"> & { readonly rows: number; readonly isRagged: boolean };
type ProductSpec<Operand extends string> = KernelSpec<Operand, "K" | "N">;

const tokens = ({ d }: KernelSpec<string, "B" | "S">): Extent => ({ rows: d.B * d.S, experts: 1, isRagged: false });
const rowsOfExperts = ({ d, bound }: KernelSpec<string, "E">): Extent => ({ rows: bound, experts: d.E, isRagged: true });

function product<Operand extends string>(
  { dtype, accumulates, bound }: ProductSpec<Operand>,
  [a, b, c]: readonly [Operand, Operand, Operand],
  layout: Pick<MatrixProduct, "m" | "n" | "depth"> & {
    readonly depthFirst: readonly [a: boolean, b: boolean];
    readonly ragged: "rows" | "depth";
  },
  { experts, isRagged }: Extent,
): MatrixProduct {
  const { depthFirst, ragged, ...sizes } = layout;
  return {
    a: { name: a, dtype: dtype[a], depthFirst: depthFirst[0] },
    b: { name: b, dtype: dtype[b], depthFirst: depthFirst[1] },
    c: { name: c, dtype: dtype[c] },
    ...sizes,
    experts,
    ...(isRagged ? { ragged } : {}),
    adds: accumulates.has(c),
    offsets: offsetsAt(bound),
  };
}

const forward = <Operand extends string>(s: ProductSpec<Operand | "x" | "w">, of: Extent, y: Operand): MatrixProduct =>
  product(s, ["x", "w", y], { m: of.rows, n: s.d.N, depth: s.d.K, depthFirst: [true, false], ragged: "rows" }, of);
const inputGrad = <Operand extends string>(s: ProductSpec<Operand | "dx">, of: Extent, dy: Operand, w: Operand): MatrixProduct =>
  product(s, [dy, w, "dx"], { m: of.rows, n: s.d.K, depth: s.d.N, depthFirst: [true, true], ragged: "rows" }, of);
const weightGrad = <Operand extends string>(s: ProductSpec<Operand | "x">, of: Extent, dy: Operand, dw: Operand): MatrixProduct =>
  product(s, ["x", dy, dw], { m: s.d.K, n: s.d.N, depth: of.rows, depthFirst: [false, false], ragged: "depth" }, of);

/** The product of `x` and `w` that a formula reads as `up`. */
const forwardInto = (s: ProductSpec<"x" | "w" | "up">, of: Extent, formula: AnyFormulaOp): MatrixProduct => ({
  ...forward(s, of, "up"),
  epilogue: { formula, storesProduct: true },
});
/** The input gradient that a formula reads as `dy`: it has the type of the gate. */
const inputGradInto = (s: ProductSpec<"dz" | "w" | "gate">, of: Extent, formula: AnyFormulaOp): MatrixProduct => {
  const product = inputGrad({ ...s, size: { ...s.size, dx: s.size.gate }, dtype: { ...s.dtype, dx: s.dtype.gate } }, of, "dz", "w");
  return { ...product, c: { ...product.c, name: "dy" }, epilogue: { formula, storesProduct: false } };
};
/** Two products of one operand. */
function forwardPair(s: ProductSpec<"x" | "w1" | "w2" | "y1" | "y2">, of: Extent): MatrixProduct {
  const layout = { m: of.rows, n: s.d.N, depth: s.d.K, depthFirst: [true, false], ragged: "rows" } as const;
  const { b, c, n } = product(s, ["x", "w2", "y2"], layout, of);
  return { ...product(s, ["x", "w1", "y1"], layout, of), twin: { b, c, n } };
}
/** The weight gradients of two products of one operand. */
function weightGradPair(s: ProductSpec<"x" | "dy1" | "dy2" | "dw1" | "dw2">, of: Extent): MatrixProduct {
  const { b, c, n } = weightGrad(s, of, "dy2", "dw2");
  return { ...weightGrad(s, of, "dy1", "dw1"), twin: { b, c, n } };
}

/** The addends of a fused sum of input gradients, in order. */
function sumOfGradients(s: KernelSpec, of: Extent): MatrixProduct {
  const addends = ["N", "F", "D"].flatMap((dim, i) => {
    const [dy, w, N] = [`dy${i + 1}`, `w${i + 1}`, s.d[dim]];
    return s.size[dy] === undefined || N === undefined ? [] : inputGrad({ ...s, d: { ...s.d, N, K: s.d.K ?? 0 } }, of, dy, w);
  });
  const [first, ...more] = addends;
  invariant(first !== undefined && more.length > 0, `${s.op} has one addend`);
  return { ...first, depth: addends.reduce((sum, p) => sum + p.depth, 0), addends };
}

/** The ops that are matrix products. */
export const productOps = {
  gemm,
  gemm_dgrad: gemmDgrad,
  gemm_wgrad: gemmWgrad,
  grouped_gemm: groupedGemm,
  grouped_dgrad: groupedDgrad,
  grouped_wgrad: groupedWgrad,
};
/** The fused ops that are sums of matrix products. */
export const sumOps = { gemm_dgrad_pair: gemmDgradPair, gemm_dgrad_triple: gemmDgradTriple, grouped_dgrad_pair: groupedDgradPair };
/** The fused ops that are two products of one operand. */
export const twinOps = { gemm_pair: gemmPair, gemm_wgrad_pair: gemmWgradPair, grouped_wgrad_pair: groupedWgradPair };
/** The fused ops that apply a formula to a product. */
export const epilogueOps = {
  gemm_swiglu: gemmSwiglu,
  grouped_gemm_swiglu: groupedGemmSwiglu,
  gemm_dgrad_swiglu: gemmDgradSwiglu,
  grouped_dgrad_swiglu: groupedDgradSwiglu,
};
const { swiglu } = gatedUnits;
const products: Readonly<Record<string, (spec: KernelSpec) => MatrixProduct>> = {
  gemm: forOp(gemm, (s) => forward(s, tokens(s), "y")),
  gemm_dgrad: forOp(gemmDgrad, (s) => inputGrad(s, tokens(s), "dy", "w")),
  gemm_wgrad: forOp(gemmWgrad, (s) => weightGrad(s, tokens(s), "dy", "dw")),
  grouped_gemm: forOp(groupedGemm, (s) => forward(s, rowsOfExperts(s), "y")),
  grouped_dgrad: forOp(groupedDgrad, (s) => inputGrad(s, rowsOfExperts(s), "dy", "w")),
  grouped_wgrad: forOp(groupedWgrad, (s) => weightGrad(s, rowsOfExperts(s), "dy", "dw")),
  gemm_pair: forOp(gemmPair, (s) => forwardPair(s, tokens(s))),
  gemm_wgrad_pair: forOp(gemmWgradPair, (s) => weightGradPair(s, tokens(s))),
  grouped_wgrad_pair: forOp(groupedWgradPair, (s) => weightGradPair(s, rowsOfExperts(s))),
  gemm_dgrad_pair: forOp(gemmDgradPair, (s) => sumOfGradients(s, tokens(s))),
  gemm_dgrad_triple: forOp(gemmDgradTriple, (s) => sumOfGradients(s, tokens(s))),
  grouped_dgrad_pair: forOp(groupedDgradPair, (s) => sumOfGradients(s, rowsOfExperts(s))),
  gemm_swiglu: forOp(gemmSwiglu, (s) => forwardInto(s, tokens(s), swiglu.dense)),
  grouped_gemm_swiglu: forOp(groupedGemmSwiglu, (s) => forwardInto(s, rowsOfExperts(s), swiglu.rows)),
  gemm_dgrad_swiglu: forOp(gemmDgradSwiglu, (s) => inputGradInto(s, tokens(s), swigluGradAgain)),
  grouped_dgrad_swiglu: forOp(groupedDgradSwiglu, (s) => inputGradInto(s, rowsOfExperts(s), swigluRowsGradAgain)),
} satisfies Record<keyof typeof productOps | keyof typeof sumOps | keyof typeof twinOps | keyof typeof epilogueOps, unknown>;

/** Returns the matrix product of a kernel spec. Throws a BrokenInvariant for an op that is no product. */
export function productOf(spec: KernelSpec): MatrixProduct {
  const of = products[spec.op];
  invariant(of !== undefined, `${spec.op} is no matrix product`);
  return spec.d.tf32 ? { ...of(spec), tf32: true } : of(spec);
}
