/**
 * Matrix products with weights, per token or per row of an expert; additions and casts. Products accumulate into their output. With the optional
 * attribute `tf32`, which src/passes/tf32.ts sets, operands are rounded to TF32.
 */
import { add as plus } from "./formula.ts";
import { gemm as product, runs } from "./matrixProduct.ts";
import { declared, formulaOp, type Grads, op } from "./op.ts";

/** Returns the attribute that products have if their operands are rounded to TF32. */
export const tf32Of = ({ tf32 }: Readonly<Record<string, number>>): number | undefined => tf32;

/** y = x·w. */
export const gemm = op({
  name: "gemm",
  sig: "x[B,S,K] w[K,N] -> y[B,S,N]",
  flops: ({ B, S, K, N }) => 2 * B * S * K * N,
  cpu: ({ x, w, y }, { B, S, K, N, ...attrs }) => product(y, x, w, { m: B * S, n: N, k: K, tf32: tf32Of(attrs) }),
  grad: ({ x, w }, { dy }): Grads => ({ x: gemmDgrad.of({ dy, w }), w: gemmWgrad.of({ x, dy }) }),
});
/** Gradient with respect to x. Also the forward of a tied head: logits = x·tableᵀ, with x as `dy` and the table as `w`. */
export const gemmDgrad = op({
  name: "gemm_dgrad",
  sig: "dy[B,S,N] w[K,N] -> dx[B,S,K]",
  linearIn: "dy",
  suffix: "dgrad",
  flops: ({ B, S, K, N }) => 2 * B * S * K * N,
  cpu: ({ dy, w, dx }, { B, S, K, N, ...attrs }) => product(dx, dy, w, { m: B * S, n: K, k: N, tb: true, tf32: tf32Of(attrs) }),
  grad: ({ dy, w }, g): Grads => ({ dy: gemm.of({ x: g.dy, w }), w: gemmWgrad.of({ x: g.dy, dy }) }),
});
/** dw = xᵀ·dy. */
export const gemmWgrad = op({
  name: "gemm_wgrad",
  sig: "x[B,S,K] dy[B,S,N] -> dw[K,N]",
  linearIn: "dy",
  suffix: "wgrad",
  types: { dw: "f32" },
  flops: ({ B, S, K, N }) => 2 * B * S * K * N,
  cpu: ({ x, dy, dw }, { B, S, K, N, ...attrs }) => product(dw, x, dy, { m: K, n: N, k: B * S, ta: true, tf32: tf32Of(attrs) }),
});

/** y = x·w per expert, for ragged rows. */
export const groupedGemm = op({
  name: "grouped_gemm",
  sig: "x[B~S~E,K] w[E,K,N] -> y[B~S~E,N]",
  flops: ({ R, K, N }) => 2 * R * K * N,
  cpu({ x, w, y }, { K, N, ...attrs }, p) {
    const tf32 = tf32Of(attrs);
    runs(p.rows, p.start("E"), (e, r, m) => product(y, x, w, { m, n: N, k: K, a0: r * K, b0: e * K * N, c0: r * N, tf32 }));
  },
  grad: ({ x, w }, { dy }): Grads => ({ x: groupedDgrad.of({ dy, w }), w: groupedWgrad.of({ x, dy }) }),
});
/** dx = dy·wᵀ per expert. */
export const groupedDgrad = op({
  name: "grouped_dgrad",
  sig: "dy[B~S~E,N] w[E,K,N] -> dx[B~S~E,K]",
  suffix: "dgrad",
  flops: ({ R, K, N }) => 2 * R * K * N,
  cpu({ dy, w, dx }, { K, N, ...attrs }, p) {
    const tf32 = tf32Of(attrs);
    runs(p.rows, p.start("E"), (e, r, m) => product(dx, dy, w, { m, n: K, k: N, tb: true, a0: r * N, b0: e * K * N, c0: r * K, tf32 }));
  },
});
/** dw = xᵀ·dy per expert. */
export const groupedWgrad = op({
  name: "grouped_wgrad",
  sig: "x[B~S~E,K] dy[B~S~E,N] -> dw[E,K,N]",
  suffix: "wgrad",
  types: { dw: "f32" },
  flops: ({ R, K, N }) => 2 * R * K * N,
  cpu({ x, dy, dw }, { K, N, ...attrs }, p) {
    const tf32 = tf32Of(attrs);
    runs(p.rows, p.start("E"), (e, r, k) => product(dw, x, dy, { m: K, n: N, k, ta: true, a0: r * K, b0: r * N, c0: e * K * N, tf32 }));
  },
});
/** y = x + b, one bias per column. */
export const addBias = formulaOp({
  name: "add_bias",
  sig: "x[B,S,N] bias[N] -> y[B,S,N]",
  formula: ({ x, bias }) => ({ y: plus(x, bias) }),
  grad: (_, { dy }): Grads => ({ x: dy, bias: biasGrad.of({ dy }) }),
});
/** The gradient of a bias: column sums. */
export const biasGrad = op({
  name: "bias_grad",
  sig: "dy[B,S,N] -> dbias[N]",
  linearIn: "dy",
  types: { dbias: "f32" },
  cpu({ dy, dbias }, { N }) {
    const sum = new Float64Array(N);
    for (let i = 0; i < dy.length; i++) sum[i % N]! += dy[i]!;
    for (let n = 0; n < N; n++) dbias[n]! += sum[n]!;
  },
});

/** Adds the bias of its expert to each row. */
export const addBiasRows = op({
  name: "add_bias_rows",
  sig: "x[B~S~E,N] bias[E,N] -> y[B~S~E,N]",
  cpu({ x, bias, y }, { N }, { rows, start }) {
    for (let r = 0; r < rows[0]!; r++) {
      const from = (rows[3 + 3 * r]! - start("E")) * N;
      for (let n = 0; n < N; n++) y[r * N + n] = x[r * N + n]! + bias[from + n]!;
    }
  },
  grad: (_, { dy }): Grads => ({ x: dy, bias: biasRowsGrad.of({ dy }) }),
});
/** Gradient with respect to the biases of experts: the sum of the rows of each. */
export const biasRowsGrad = op({
  name: "bias_rows_grad",
  sig: "dy[B~S~E,N] -> dbias[E,N]",
  suffix: "wgrad",
  types: { dbias: "f32" },
  cpu({ dy, dbias }, { N }, { rows, start }) {
    const sum = new Float64Array(dbias.length);
    for (let r = 0; r < rows[0]!; r++) {
      const to = (rows[3 + 3 * r]! - start("E")) * N;
      for (let n = 0; n < N; n++) sum[to + n]! += dy[r * N + n]!;
    }
    for (let i = 0; i < sum.length; i++) dbias[i]! += sum[i]!;
  },
});

/** y = a + b. */
export const add = formulaOp({
  name: "add",
  sig: "a[...] b[...] -> y[...]",
  linear: true,
  formula: ({ a, b }) => ({ y: plus(a, b) }),
  grad: (_, { dy }): Grads => ({ a: dy, b: dy }),
});
/** Converts to another type, which the caller sets on the result. */
export const cast = formulaOp({
  name: "cast",
  sig: "x[...] -> y[...]",
  linear: true,
  formula: ({ x }) => ({ y: x }),
  grad({ x }, { dy }): Grads {
    return { x: declared(cast.of({ x: dy }), { dtype: x.dtype }) };
  },
});
/** Adds the gradient of one microbatch to the sum of the earlier ones. */
export const accumulate = formulaOp({
  name: "accumulate",
  sig: "x[...] -> y[...]",
  linear: true,
  inPlace: ["y"],
  types: { y: "f32" },
  formula: ({ x, y }) => ({ y: plus(y, x) }),
});
