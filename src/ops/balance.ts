/** What keeps tokens spread over the experts: losses on how often each was chosen, or a bias that goes by it. */
import { type Grads, op } from "./op.ts";

// -- for each microbatch of P sequences, or with P = 1 for each sequence

/** How many of its tokens chose each expert. */
export const tally = op({
  name: "tally",
  sig: "c[A*P,S,E] -> n[A,E]",
  types: { n: "f32" },
  cpu({ c, n }, { P, S, E }) {
    for (let i = 0; i < c.length; i++) n[Math.floor(i / (P * S * E)) * E + (i % E)]! += c[i]!;
  },
});
/** c · Σ p·n: its sum over tokens is owed, while the counts are needed whole. The counts take no gradient. */
export const auxLoss = op({
  name: "aux_loss",
  sig: "p[A*P,S,E] n[A,E] -> y[]",
  types: { y: "f32" },
  cpu({ p, n, y }, { P, S, E, c }) {
    let sum = 0;
    for (let i = 0; i < p.length; i++) sum += p[i]! * n[Math.floor(i / (P * S * E)) * E + (i % E)]!;
    y[0]! += c! * sum;
  },
  grad: ({ p, n }, { dy }, a): Grads => ({ p: auxLossGrad.of({ p, n, dy }, a) }),
});
/** Of `p` only the shape is read. */
export const auxLossGrad = op({
  name: "aux_loss_grad",
  sig: "p[A*P,S,E] n[A,E] dy[] -> dp[A*P,S,E]",
  cpu({ n, dy, dp }, { P, S, E, c }) {
    for (let i = 0; i < dp.length; i++) dp[i] = c! * dy[0]! * n[Math.floor(i / (P * S * E)) * E + (i % E)]!;
  },
});

// -- the same over all microbatches of the step so far

/** The running sum of a step's counts, `total`, over the number of microbatches in it: each has `choices` of them. */
export const runningMean = op({
  name: "running_mean",
  sig: "n[E!] -> mean[E!] total[E!]",
  updates: ["total"],
  cpu({ n, mean, total }, { E, choices }) {
    let sum = 0;
    for (let e = 0; e < E; e++) {
      total[e]! += n[e]!;
      sum += total[e]!;
    }
    for (let e = 0; e < E; e++) mean[e] = (total[e]! * choices!) / sum;
  },
});
/** c · Σ p·n, with one count for all microbatches. */
export const globalAuxLoss = op({
  name: "global_aux_loss",
  sig: "p[B,S,E] n[E] -> y[]",
  types: { y: "f32" },
  cpu({ p, n, y }, { E, c }) {
    let sum = 0;
    for (let i = 0; i < p.length; i++) sum += p[i]! * n[i % E]!;
    y[0]! += c! * sum;
  },
  grad: ({ p, n }, { dy }, a): Grads => ({ p: globalAuxLossGrad.of({ p, n, dy }, a) }),
});
/** Of `p` only the shape is read. */
export const globalAuxLossGrad = op({
  name: "global_aux_loss_grad",
  sig: "p[B,S,E] n[E] dy[] -> dp[B,S,E]",
  cpu({ n, dy, dp }, { E, c }) {
    for (let i = 0; i < dp.length; i++) dp[i] = c! * dy[0]! * n[i % E]!;
  },
});

// -- a bias of the choice in place of a loss: once a step, by what was counted in it

/** How many tokens chose each expert. */
export const loads = op({
  name: "loads",
  sig: "c[B,S,E] -> n[E]",
  types: { n: "f32" },
  cpu({ c, n }, { E }) {
    for (let i = 0; i < c.length; i++) n[i % E]! += c[i]!;
  },
});
/** Towards the mean load, by steps of one size whatever the distance (DeepSeek-V3). */
export const biasUpdate = op({
  name: "bias_update",
  sig: "n[E!] -> bias[E!]",
  updates: ["bias"],
  types: { bias: "f32" },
  cpu({ n, bias }, { E, rate }) {
    let sum = 0;
    for (const x of n) sum += x;
    for (let e = 0; e < E; e++) bias[e]! += rate! * Math.sign(sum / E - n[e]!);
  },
});
