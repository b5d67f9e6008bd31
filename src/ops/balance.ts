/** Load balancing of experts: losses on the expert counts, biases updated from them, and balanced assignments. */
import { mul, total } from "./formula.ts";
import { formulaOp, type Grads, op } from "./op.ts";

// -- per microbatch of P sequences, or with P = 1 per sequence

/** Counts the tokens of each group that chose each expert. */
export const expertCounts = op({
  name: "expert_counts",
  sig: "c[A*P,S,E] -> n[A,E]",
  types: { n: "f32" },
  cpu({ c, n }, { P, S, E }) {
    for (let i = 0; i < c.length; i++) n[Math.floor(i / (P * S * E)) * E + (i % E)]! += c[i]!;
  },
});
/** c · Σ p·n: partial over shards of tokens, while the counts are those of the whole group. The counts have no gradient. */
export const auxLoss = formulaOp({
  name: "aux_loss",
  sig: "p[A*P,S,E] n[A,E] -> y[]",
  types: { y: "f32" },
  attrs: ["c"],
  formula: ({ p, n }, { c }) => ({ y: total(mul(p, n), c) }),
  grad: ({ p, n }, { dy }, a): Grads => ({ p: auxLossGrad.of({ p, n, dy }, a) }),
});
/** Gradient with respect to p; only the shape of `p` is read. */
export const auxLossGrad = formulaOp({
  name: "aux_loss_grad",
  sig: "p[A*P,S,E] n[A,E] dy[] -> dp[A*P,S,E]",
  attrs: ["c"],
  formula: ({ n, dy }, { c }) => ({ dp: mul(c, dy, n) }),
});

// -- over all microbatches of the step so far

/** Adds the counts to `total`, the running sum of the step, and returns `total` divided by its number of microbatches (`choices` counts each). */
export const runningMean = op({
  name: "running_mean",
  sig: "n[E!] -> mean[E!] total[E!]",
  attrs: ["choices"],
  inPlace: ["total"],
  cpu({ n, mean, total }, { E, choices }) {
    let sum = 0;
    for (let e = 0; e < E; e++) {
      total[e]! += n[e]!;
      sum += total[e]!;
    }
    for (let e = 0; e < E; e++) mean[e] = (total[e]! * choices) / sum;
  },
});
/** c · Σ p·n, with one count vector for all microbatches. */
export const globalAuxLoss = formulaOp({
  name: "global_aux_loss",
  sig: "p[B,S,E] n[E] -> y[]",
  types: { y: "f32" },
  attrs: ["c"],
  formula: ({ p, n }, { c }) => ({ y: total(mul(p, n), c) }),
  grad: ({ p, n }, { dy }, a): Grads => ({ p: globalAuxLossGrad.of({ p, n, dy }, a) }),
});
/** Gradient with respect to p; only the shape of `p` is read. */
export const globalAuxLossGrad = formulaOp({
  name: "global_aux_loss_grad",
  sig: "p[B,S,E] n[E] dy[] -> dp[B,S,E]",
  attrs: ["c"],
  formula: ({ n, dy }, { c }) => ({ dp: mul(c, dy, n) }),
});

// -- balanced assignments

/**
 * Sinkhorn iteration (S-BASE) on exp(x) of a microbatch of P sequences: rows and columns are scaled in turns until all rows have equal sums
 * and all columns have. It stops when the column factors change by less than 1e-4 on average, as in Megatron Core. `rounds` becomes
 * max(rounds, iterations); after `most` iterations the op stops, and the run ends with an error.
 */
export const sinkhorn = op({
  name: "sinkhorn",
  sig: "x[A*P,S!,E!] -> y[A*P,S!,E!] rounds[]",
  attrs: ["most"],
  reduction: "max",
  inPlace: ["rounds"],
  limits: { rounds: "most" },
  types: { y: "f32", rounds: "i32" },
  cpu({ x, y, rounds }, { A, P, S, E, most }) {
    const T = P * S;
    const d0 = new Float64Array(T);
    for (let a = 0; a < A; a++) {
      const cost = Float64Array.from(x.subarray(a * T * E, (a + 1) * T * E), Math.exp);
      const d1 = new Float64Array(E).fill(1);
      let turn = 0;
      // NaN is not converged
      for (let moved = 1; !(moved <= 1e-4) && turn <= most; turn++) {
        const columns = new Float64Array(E);
        for (let t = 0; t < T; t++) {
          let row = 0;
          for (let e = 0; e < E; e++) row += cost[t * E + e]! * d1[e]!;
          d0[t] = 1 / T / (row + 1e-8);
          for (let e = 0; e < E; e++) columns[e]! += cost[t * E + e]! * d0[t]!;
        }
        moved = 0;
        for (let e = 0; e < E; e++) {
          const next = 1 / E / (columns[e]! + 1e-8);
          moved += Math.abs(next - d1[e]!) / E;
          d1[e] = next;
        }
      }
      for (let i = 0; i < T * E; i++) y[a * T * E + i] = d1[i % E]! * cost[i]! * d0[Math.floor(i / E)]!;
      rounds[0] = Math.max(rounds[0]!, turn);
    }
  },
});

/**
 * The bias that would balance the experts of a microbatch of P sequences. With α of a token its (k+1)-th largest x − bias (the threshold of
 * its top k), the bias of an expert is its (⌊T·k/E⌋ + 1)-th largest x − α, so that T·k/E tokens exceed it. The result is the mean
 * over `count` microbatches.
 */
export const quantile = op({
  name: "quantile",
  sig: "x[A*P,S!,E!] bias[E!] -> q[E!]",
  attrs: ["k", "count"],
  types: { q: "f32" },
  cpu({ x, bias, q }, { A, P, S, E, k, count }) {
    const T = P * S;
    const target = Math.floor((T * k) / E);
    const largest = (values: Float32Array, n: number) => values.sort().at(-n)!;
    for (let a = 0; a < A; a++) {
      const own = x.subarray(a * T * E, (a + 1) * T * E);
      const alpha = Float32Array.from({ length: T }, (_, t) =>
        largest(
          own.slice(t * E, (t + 1) * E).map((v, e) => v - bias[e]!),
          k + 1,
        ),
      );
      for (let e = 0; e < E; e++)
        q[e]! +=
          largest(
            alpha.map((least, t) => own[t * E + e]! - least),
            target + 1,
          ) / count;
    }
  },
});
/** Moves the biases towards the quantiles n of the step by an exponential moving average; the biases sum to 0. `scale` 0 skips the update. */
export const quantileUpdate = op({
  name: "quantile_update",
  sig: "n[E!] scale[] -> bias[E!]",
  attrs: ["ema"],
  inPlace: ["bias"],
  types: { bias: "f32" },
  cpu({ n, scale, bias }, { E, ema }) {
    if (scale[0] === 0) return;
    let sum = 0;
    for (let e = 0; e < E; e++) {
      bias[e] = ema * bias[e]! + (1 - ema) * n[e]!;
      sum += bias[e]!;
    }
    for (let e = 0; e < E; e++) bias[e]! -= sum / E;
  },
});

// -- expert bias instead of a loss: updated once per step from the expert loads

/** Counts the tokens that chose each expert. */
export const expertLoad = op({
  name: "expert_load",
  sig: "c[B,S,E] -> n[E]",
  types: { n: "f32" },
  cpu({ c, n }, { E }) {
    for (let i = 0; i < c.length; i++) n[i % E]! += c[i]!;
  },
});
/** Like expert_load, into row `row` of T, the number of layers with experts: one buffer holds the loads of all layers, so one collective sums them. */
export const expertLoads = op({
  name: "expert_loads",
  sig: "c[B,S,E] -> n[T,E]",
  inPlace: ["n"],
  types: { n: "f32" },
  runtimeAttrs: ["row"],
  cpu({ c, n }, { E, row }) {
    for (let i = 0; i < c.length; i++) n[row! * E + (i % E)]! += c[i]!;
  },
});
/** Moves each bias by a fixed step towards the mean load (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). `scale` 0 skips the update. */
export const biasUpdate = op({
  name: "bias_update",
  sig: "n[E!] scale[] -> bias[E!]",
  attrs: ["rate"],
  inPlace: ["bias"],
  types: { bias: "f32" },
  cpu({ n, scale, bias }, { E, rate }) {
    if (scale[0] === 0) return;
    let sum = 0;
    for (const x of n) sum += x;
    for (let e = 0; e < E; e++) bias[e]! += rate * Math.sign(sum / E - n[e]!);
  },
});
