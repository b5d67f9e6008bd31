/**
 * Ops that stand for several instructions of a program (src/passes/fuse.ts). A target whose kernels include them runs them in place of
 * those instructions; no graph has them, so they have no gradient.
 */
import type { Result } from "./formula.ts";
import { gatedUnits } from "./gatedUnits.ts";
import { gemm, gemmDgrad, gemmWgrad, groupedDgrad, groupedGemm, groupedWgrad, tf32Of } from "./gemm.ts";
import { gemm as product, runs } from "./matrixProduct.ts";
import { unpermute } from "./moe.ts";
import { headNorm, headNormGrad, rmsnorm, rmsnormGrad } from "./norm.ts";
import { formulaOp, invariant, op } from "./op.ts";
import { rope } from "./rope.ts";

/** The sum of the input gradients of two products of one input: dx = Σ dyᵢ·wᵢᵀ, rounded once. Sharding one depth alone would count the other twice. */
export const gemmDgradPair = op({
  name: "gemm_dgrad_pair",
  sig: "dy1[B,S,N!] w1[K,N!] dy2[B,S,F!] w2[K,F!] -> dx[B,S,K]",
  suffix: "dgrad",
  flops: ({ B, S, K, N, F }) => 2 * B * S * K * (N + F),
  cpu({ dy1, w1, dy2, w2, dx }, { B, S, K, N, F, ...attrs }) {
    const tf32 = tf32Of(attrs);
    product(dx, dy1, w1, { m: B * S, n: K, k: N, tb: true, tf32 });
    product(dx, dy2, w2, { m: B * S, n: K, k: F, tb: true, tf32 });
  },
});
/** The same of three products, as those of queries, keys and values. */
export const gemmDgradTriple = op({
  name: "gemm_dgrad_triple",
  sig: "dy1[B,S,N!] w1[K,N!] dy2[B,S,F!] w2[K,F!] dy3[B,S,D!] w3[K,D!] -> dx[B,S,K]",
  suffix: "dgrad",
  flops: ({ B, S, K, N, F, D }) => 2 * B * S * K * (N + F + D),
  cpu({ dy1, w1, dy2, w2, dy3, w3, dx }, { B, S, K, N, F, D, ...attrs }) {
    const tf32 = tf32Of(attrs);
    product(dx, dy1, w1, { m: B * S, n: K, k: N, tb: true, tf32 });
    product(dx, dy2, w2, { m: B * S, n: K, k: F, tb: true, tf32 });
    product(dx, dy3, w3, { m: B * S, n: K, k: D, tb: true, tf32 });
  },
});
/** The same of two products of the rows of experts. */
export const groupedDgradPair = op({
  name: "grouped_dgrad_pair",
  sig: "dy1[B~S~E,N!] w1[E,K,N!] dy2[B~S~E,F!] w2[E,K,F!] -> dx[B~S~E,K]",
  suffix: "dgrad",
  flops: ({ R, K, N, F }) => 2 * R * K * (N + F),
  cpu({ dy1, w1, dy2, w2, dx }, { K, N, F, ...attrs }, p) {
    const tf32 = tf32Of(attrs);
    runs(p.rows, p.start("E"), (e, r, m) => {
      product(dx, dy1, w1, { m, n: K, k: N, tb: true, a0: r * N, b0: e * K * N, c0: r * K, tf32 });
      product(dx, dy2, w2, { m, n: K, k: F, tb: true, a0: r * F, b0: e * K * F, c0: r * K, tf32 });
    });
  },
});
/** Two products of one operand, as keys and values: it is read once, and one launch has the tiles of both. */
export const gemmPair = op({
  name: "gemm_pair",
  sig: "x[B,S,K] w1[K,N] w2[K,N] -> y1[B,S,N] y2[B,S,N]",
  flops: ({ B, S, K, N }) => 4 * B * S * K * N,
  cpu({ x, w1, w2, y1, y2 }, d, p) {
    gemm.cpu({ x, w: w1, y: y1 }, d, p);
    gemm.cpu({ x, w: w2, y: y2 }, d, p);
  },
});
/** The weight gradients of two products of one operand. */
export const gemmWgradPair = op({
  name: "gemm_wgrad_pair",
  sig: "x[B,S,K] dy1[B,S,N] dy2[B,S,N] -> dw1[K,N] dw2[K,N]",
  suffix: "wgrad",
  types: { dw1: "f32", dw2: "f32" },
  flops: ({ B, S, K, N }) => 4 * B * S * K * N,
  cpu({ x, dy1, dy2, dw1, dw2 }, d, p) {
    gemmWgrad.cpu({ x, dy: dy1, dw: dw1 }, d, p);
    gemmWgrad.cpu({ x, dy: dy2, dw: dw2 }, d, p);
  },
});
/** The weight gradients of two products of the same rows of experts, as gate and up: rows are read once, and one launch has the tiles of both. */
export const groupedWgradPair = op({
  name: "grouped_wgrad_pair",
  sig: "x[B~S~E,K] dy1[B~S~E,N] dy2[B~S~E,N] -> dw1[E,K,N] dw2[E,K,N]",
  suffix: "wgrad",
  types: { dw1: "f32", dw2: "f32" },
  flops: ({ R, K, N }) => 4 * R * K * N,
  cpu({ x, dy1, dy2, dw1, dw2 }, d, p) {
    groupedWgrad.cpu({ x, dy: dy1, dw: dw1 }, d, p);
    groupedWgrad.cpu({ x, dy: dy2, dw: dw2 }, d, p);
  },
});

const { swiglu } = gatedUnits;
/** Returns results of formulas of other ops by name. */
function named<N extends string>(names: readonly N[], results: Readonly<Record<string, Result>>): Readonly<Record<N, Result>> {
  const found = names.map((name) => {
    const result = results[name];
    invariant(result !== undefined, `a formula has no result ${name}`);
    return [name, result] as const;
  });
  return Object.fromEntries(found) as Record<N, Result>;
}
/** The gradient of swiglu, which also returns y: backward needs it for a weight gradient, and has all that it depends on in registers. */
export const swigluGradAgain = formulaOp({
  name: "swiglu_grad_again",
  sig: "gate[B,S,F] up[B,S,F] dy[B,S,F] -> dgate[B,S,F] dup[B,S,F] y[B,S,F]",
  formula: (t, d) => named(["dgate", "dup", "y"], { ...swiglu.denseGrad.formula(t, d), ...swiglu.dense.formula(t, d) }),
});
/** The same for the rows of experts. */
export const swigluRowsGradAgain = formulaOp({
  name: "swiglu_rows_grad_again",
  sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] dy[B~S~E,F] -> dgate[B~S~E,F] dup[B~S~E,F] dp[B~S~E] y[B~S~E,F]",
  types: { dp: "f32" },
  formula: (t, d) => named(["dgate", "dup", "dp", "y"], { ...swiglu.rowsGrad.formula(t, d), ...swiglu.rows.formula(t, d) }),
});

/** The product up = x·w and y = silu(gate)·up, which reads the sums of the product. */
export const gemmSwiglu = op({
  name: "gemm_swiglu",
  sig: "x[B,S,K!] w[K!,N] gate[B,S,N] -> up[B,S,N] y[B,S,N]",
  flops: ({ B, S, K, N }) => 2 * B * S * K * N,
  cpu({ x, w, gate, up, y }, d, p) {
    gemm.cpu({ x, w, y: up }, d, p);
    swiglu.dense.cpu({ gate, up, y }, { ...d, F: d.N }, p);
  },
});
/** The same for the rows of experts, with their combine weights p. */
export const groupedGemmSwiglu = op({
  name: "grouped_gemm_swiglu",
  sig: "x[B~S~E,K!] w[E,K!,N] gate[B~S~E,N] p[B~S~E] -> up[B~S~E,N] y[B~S~E,N]",
  flops: ({ R, K, N }) => 2 * R * K * N,
  cpu({ x, w, gate, p: weights, up, y }, d, p) {
    groupedGemm.cpu({ x, w, y: up }, d, p);
    swiglu.rows.cpu({ gate, up, p: weights, y }, { ...d, F: d.N }, p);
  },
});
/** The product dy = dz·wᵀ and swiglu_grad_again of it: dy is never in memory. */
export const gemmDgradSwiglu = op({
  name: "gemm_dgrad_swiglu",
  sig: "dz[B,S,N!] w[K,N!] gate[B,S,K] up[B,S,K] -> dgate[B,S,K] dup[B,S,K] y[B,S,K]",
  suffix: "dgrad",
  flops: ({ B, S, K, N }) => 2 * B * S * K * N,
  cpu({ dz, w, gate, up, dgate, dup, y }, d, p) {
    const dy = new Float32Array(gate.length);
    gemmDgrad.cpu({ dy: dz, w, dx: dy }, d, p);
    swigluGradAgain.cpu({ gate, up, dy, dgate, dup, y }, { ...d, F: d.K }, p);
  },
});
/** The same for the rows of experts. */
export const groupedDgradSwiglu = op({
  name: "grouped_dgrad_swiglu",
  sig: "dz[B~S~E,N!] w[E,K,N!] gate[B~S~E,K] up[B~S~E,K] p[B~S~E] -> dgate[B~S~E,K] dup[B~S~E,K] dp[B~S~E] y[B~S~E,K]",
  suffix: "dgrad",
  types: { dp: "f32" },
  flops: ({ R, K, N }) => 2 * R * K * N,
  cpu({ dz, w, gate, up, p: weights, dgate, dup, dp, y }, d, p) {
    const dy = new Float32Array(gate.length);
    groupedDgrad.cpu({ dy: dz, w, dx: dy }, d, p);
    swigluRowsGradAgain.cpu({ gate, up, p: weights, dy, dgate, dup, dp, y }, { ...d, F: d.K }, p);
  },
});

/** unpermute, to whose sums z is added before they are rounded: of the experts of all ranks, or z would be counted twice. */
export const unpermuteAdd = op({
  name: "unpermute_add",
  sig: "r[B~S~E!,D] c[B,S,E!] z[B,S,D] -> x[B,S,D]",
  cpu({ r, c, z, x }, d, p) {
    unpermute.cpu({ r, c, x }, d, p);
    for (let i = 0; i < x.length; i++) x[i]! += z[i]!;
  },
});

/** rmsnorm_grad, to which the gradient z of the residual stream is added before dx is rounded. */
export const rmsnormGradAdd = op({
  name: "rmsnorm_grad_add",
  sig: "x[B,S,D!] gain[D!] dy[B,S,D!] z[B,S,D!] -> dx[B,S,D!] dgain[D!]",
  attrs: ["eps"],
  types: { dgain: "f32" },
  cpu({ z, ...t }, d, p) {
    rmsnormGrad.cpu(t, d, p);
    for (let i = 0; i < z.length; i++) t.dx[i]! += z[i]!;
  },
});

/** Returns the sum of arrays. */
function summed(first: Float32Array, ...more: readonly Float32Array[]): Float32Array {
  const sum = first.slice();
  for (const addend of more) for (let i = 0; i < sum.length; i++) sum[i]! += addend[i]!;
  return sum;
}
/** A sum of the residual stream and its norm, which reads the sum as it is stored. */
export const rmsnormSum = op({
  name: "rmsnorm_sum",
  sig: "x1[B,S,D!] x2[B,S,D!] gain[D!] -> sum[B,S,D!] y[B,S,D!]",
  attrs: ["eps"],
  cpu({ x1, x2, gain, sum, y }, d, p) {
    sum.set(summed(x1, x2));
    rmsnorm.cpu({ x: sum, gain, y }, d, p);
  },
});
/** The same of three addends. */
export const rmsnormSumTriple = op({
  name: "rmsnorm_sum_triple",
  sig: "x1[B,S,D!] x2[B,S,D!] x3[B,S,D!] gain[D!] -> sum[B,S,D!] y[B,S,D!]",
  attrs: ["eps"],
  cpu({ x1, x2, x3, gain, sum, y }, d, p) {
    sum.set(summed(x1, x2, x3));
    rmsnorm.cpu({ x: sum, gain, y }, d, p);
  },
});
/** rmsnorm_grad_add, whose dy is a sum. */
export const rmsnormGradAddPair = op({
  name: "rmsnorm_grad_add_pair",
  sig: "x[B,S,D!] gain[D!] dy1[B,S,D!] dy2[B,S,D!] z[B,S,D!] -> dx[B,S,D!] dgain[D!]",
  attrs: ["eps"],
  types: { dgain: "f32" },
  cpu: ({ dy1, dy2, ...t }, d, p) => rmsnormGradAdd.cpu({ ...t, dy: summed(dy1, dy2) }, d, p),
});
/** The same of three addends. */
export const rmsnormGradAddTriple = op({
  name: "rmsnorm_grad_add_triple",
  sig: "x[B,S,D!] gain[D!] dy1[B,S,D!] dy2[B,S,D!] dy3[B,S,D!] z[B,S,D!] -> dx[B,S,D!] dgain[D!]",
  attrs: ["eps"],
  types: { dgain: "f32" },
  cpu: ({ dy1, dy2, dy3, ...t }, d, p) => rmsnormGradAdd.cpu({ ...t, dy: summed(dy1, dy2, dy3) }, d, p),
});

const rotation = ["interleaved", "sign", "theta", "scaling", "factor", "original", "low", "high", "gain", "chunk", "ranks"] as const;
/** A norm of each head (its gain is `weight`), and the rotation of all its channels. */
export const headNormRope = op({
  name: "head_norm_rope",
  sig: "x[B,S,H*C] weight[C!] -> y[B,S,H*C]",
  attrs: ["eps", ...rotation],
  cpu({ x, weight, y }, d, p) {
    const normed = new Float32Array(x.length);
    headNorm.cpu({ x, gain: weight, y: normed }, d, p);
    rope.cpu({ x: normed, y }, { ...d, first: 0, width: d.C }, p);
  },
});
/** The gradient of both: `sign` is the opposite of that of the rotation. */
export const headNormRopeGrad = op({
  name: "head_norm_rope_grad",
  sig: "x[B,S,H*C] weight[C!] dy[B,S,H*C] -> dx[B,S,H*C] dweight[C!]",
  attrs: ["eps", ...rotation],
  types: { dweight: "f32" },
  cpu({ x, weight, dy, dx, dweight }, d, p) {
    const turned = new Float32Array(dy.length);
    rope.cpu({ x: dy, y: turned }, { ...d, first: 0, width: d.C }, p);
    headNormGrad.cpu({ x, gain: weight, dy: turned, dx, dgain: dweight }, d, p);
  },
});

/** The maximum of each row of logits, and what softmax_terms returns for it, in one pass: of a vocabulary that no rank shards. `ids` as there. */
export const softmaxStatistics = op({
  name: "softmax_statistics",
  sig: "x[B,S,V!] target[B,S] -> m[B,S] s[B,S] p[B,S]",
  types: { m: "f32", s: "f32", p: "f32" },
  cpu({ x, target, m, s, p }, { V, ids = V }) {
    for (let t = 0; t < m.length; t++) {
      const row = x.subarray(t * V, t * V + ids);
      const most = row.reduce((a, b) => Math.max(a, b), -Infinity);
      m[t] = most;
      s[t] = row.reduce((sum, value) => sum + Math.exp(value - most), 0);
      const id = target[t]!;
      p[t] = id >= 0 && id < ids ? row[id]! : 0;
    }
  },
});
