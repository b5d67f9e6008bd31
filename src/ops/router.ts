/**
 * The router: scores of all experts, which of them a token chooses, as a map c of ones and zeros, and what each chosen one weighs.
 * The map takes no gradient: a small change of the scores changes no choice.
 */
import { type Grads, op } from "./op.ts";

// -- scores

export const softmax = op({
  name: "softmax",
  sig: "x[B,S,E!] -> y[B,S,E!]",
  types: { y: "f32" },
  cpu({ x, y }, { E }) {
    for (let o = 0; o < x.length; o += E) {
      const log = logSumExp(x, o, E);
      for (let e = 0; e < E; e++) y[o + e] = Math.exp(x[o + e]! - log);
    }
  },
  grad({ x }, { y, dy }): Grads {
    const dx = softmaxGrad.of({ y, dy });
    dx.dtype = x.dtype;
    return { x: dx };
  },
});
/** dx = y·(dy − Σ y·dy) */
export const softmaxGrad = op({
  name: "softmax_grad",
  sig: "y[B,S,E!] dy[B,S,E!] -> dx[B,S,E!]",
  cpu({ y, dy, dx }, { E }) {
    for (let o = 0; o < y.length; o += E) {
      let dot = 0;
      for (let e = 0; e < E; e++) dot += y[o + e]! * dy[o + e]!;
      for (let e = 0; e < E; e++) dx[o + e] = y[o + e]! * (dy[o + e]! - dot);
    }
  },
});
function logSumExp(x: Float32Array, at: number, count: number): number {
  let max = -Infinity;
  for (let e = 0; e < count; e++) max = Math.max(max, x[at + e]!);
  let sum = 0;
  for (let e = 0; e < count; e++) sum += Math.exp(x[at + e]! - max);
  return max + Math.log(sum);
}

// -- the choice

/** The k largest scores, of equal ones the lower index. */
export const choose = op({
  name: "choose",
  sig: "x[B,S,E!] -> c[B,S,E!]",
  types: { c: "f32" },
  cpu({ x, c }, { E, k }) {
    const open = new Uint8Array(E);
    for (let o = 0; o < x.length; o += E) {
      open.fill(1);
      for (let i = 0; i < k!; i++) {
        const best = largest(x, o, open);
        if (best >= 0) c[o + best] = 1;
      }
    }
  },
});
/** The place of the largest of x[at…] that is open, of equal ones the first, and closes it; −1 where none is, or none is a number. */
function largest(x: Float32Array, at: number, open: Uint8Array): number {
  let best = -1;
  for (let e = 0; e < open.length; e++) if (open[e] && x[at + e]! > (best < 0 ? Number.NEGATIVE_INFINITY : x[at + best]!)) best = e;
  if (best >= 0) open[best] = 0;
  return best;
}

/** y = p where c holds a one, else 0; with `normalize` divided by their sum. */
export const weigh = op({
  name: "weigh",
  sig: "p[B,S,E!] c[B,S,E!] -> y[B,S,E!]",
  types: { y: "f32" },
  cpu({ p, c, y }, { E, normalize }) {
    for (let o = 0; o < y.length; o += E) {
      let sum = 0;
      for (let e = 0; e < E; e++) sum += c[o + e]! * p[o + e]!;
      const share = normalize ? 1 / (sum + TINY) : 1;
      for (let e = 0; e < E; e++) y[o + e] = c[o + e]! * p[o + e]! * share;
    }
  },
  grad: ({ p, c }, { dy }, a): Grads => ({ p: weighGrad.of({ p, c, dy }, a) }),
});
/** dp = dy for those chosen; normalised, y = p/Σp gives dp = (dy − Σ y·dy)/Σp. */
export const weighGrad = op({
  name: "weigh_grad",
  sig: "p[B,S,E!] c[B,S,E!] dy[B,S,E!] -> dp[B,S,E!]",
  cpu({ p, c, dy, dp }, { E, normalize }) {
    for (let o = 0; o < dp.length; o += E) {
      let sum = 0;
      let dot = 0;
      for (let e = 0; e < E; e++) {
        sum += c[o + e]! * p[o + e]!;
        dot += c[o + e]! * p[o + e]! * dy[o + e]!;
      }
      const share = normalize ? 1 / (sum + TINY) : 1;
      const mean = normalize ? dot * share : 0;
      for (let e = 0; e < E; e++) dp[o + e] = c[o + e]! * (dy[o + e]! - mean) * share;
    }
  },
});
/** Added to a sum of weights that is divided by, as in Megatron Core: a sum of zeros gives zeros. */
const TINY = 1e-20;

// -- the loss that keeps logits small

/** c · Σ logsumexp(x)² */
export const zLoss = op({
  name: "z_loss",
  sig: "x[B,S,E!] -> y[]",
  types: { y: "f32" },
  cpu({ x, y }, { E, c }) {
    let sum = 0;
    for (let o = 0; o < x.length; o += E) sum += logSumExp(x, o, E) ** 2;
    y[0]! += c! * sum;
  },
  grad: ({ x }, { dy }, a): Grads => ({ x: zLossGrad.of({ x, dy }, a) }),
});
/** dx = 2c · logsumexp(x) · softmax(x) */
export const zLossGrad = op({
  name: "z_loss_grad",
  sig: "x[B,S,E!] dy[] -> dx[B,S,E!]",
  cpu({ x, dy, dx }, { E, c }) {
    for (let o = 0; o < x.length; o += E) {
      const log = logSumExp(x, o, E);
      for (let e = 0; e < E; e++) dx[o + e] = 2 * c! * dy[0]! * log * Math.exp(x[o + e]! - log);
    }
  },
});
