/**
 * The router: scores of all experts, the top-k mask c of ones and zeros, and the combine weights of the chosen experts. The mask has no
 * gradient: a small change of the scores does not change the choice.
 */
import { type Attrs, type Grads, op } from "./op.ts";

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

const logistic = (x: number) => 1 / (1 + Math.exp(-x));
export const sigmoid = op({
  name: "sigmoid",
  sig: "x[B,S,E] -> y[B,S,E]",
  types: { y: "f32" },
  cpu({ x, y }) {
    for (let i = 0; i < y.length; i++) y[i] = logistic(x[i]!);
  },
  grad({ x }, { y, dy }): Grads {
    const dx = sigmoidGrad.of({ y, dy });
    dx.dtype = x.dtype;
    return { x: dx };
  },
});
export const sigmoidGrad = op({
  name: "sigmoid_grad",
  sig: "y[B,S,E] dy[B,S,E] -> dx[B,S,E]",
  cpu({ y, dy, dx }) {
    for (let i = 0; i < dx.length; i++) dx[i] = dy[i]! * y[i]! * (1 - y[i]!);
  },
});
/** √log(1 + e^x) */
export const sqrtSoftplus = op({
  name: "sqrt_softplus",
  sig: "x[B,S,E] -> y[B,S,E]",
  types: { y: "f32" },
  cpu({ x, y }) {
    for (let i = 0; i < y.length; i++) y[i] = Math.sqrt(Math.max(0, x[i]!) + Math.log1p(Math.exp(-Math.abs(x[i]!))));
  },
  grad: ({ x }, { y, dy }): Grads => ({ x: sqrtSoftplusGrad.of({ x, y, dy }) }),
});
/** dx = dy · σ(x)/(2y); 0 where y underflowed to 0. */
export const sqrtSoftplusGrad = op({
  name: "sqrt_softplus_grad",
  sig: "x[B,S,E] y[B,S,E] dy[B,S,E] -> dx[B,S,E]",
  cpu({ x, y, dy, dx }) {
    for (let i = 0; i < dx.length; i++) dx[i] = y[i]! > 0 ? (dy[i]! * logistic(x[i]!)) / (2 * y[i]!) : 0;
  },
});

/** Divides the scores of a token by their sum. Softmax scores are normalised already. */
export const normalize = op({
  name: "normalize",
  sig: "p[B,S,E!] -> y[B,S,E!]",
  cpu({ p, y }, { E }) {
    for (let o = 0; o < p.length; o += E) {
      let sum = 0;
      for (let e = 0; e < E; e++) sum += p[o + e]!;
      for (let e = 0; e < E; e++) y[o + e] = p[o + e]! / (sum + TINY);
    }
  },
  grad: ({ p }, { dy }): Grads => ({ p: normalizeGrad.of({ p, dy }) }),
});
/** dp = (dy − Σ p·dy/Σp)/Σp */
export const normalizeGrad = op({
  name: "normalize_grad",
  sig: "p[B,S,E!] dy[B,S,E!] -> dp[B,S,E!]",
  cpu({ p, dy, dp }, { E }) {
    for (let o = 0; o < p.length; o += E) {
      let sum = 0;
      let dot = 0;
      for (let e = 0; e < E; e++) {
        sum += p[o + e]!;
        dot += p[o + e]! * dy[o + e]!;
      }
      const mean = dot / (sum + TINY);
      for (let e = 0; e < E; e++) dp[o + e] = (dy[o + e]! - mean) / (sum + TINY);
    }
  },
});
/** Added to the sum in a denominator, as in Megatron Core, so that a sum of zeros gives zeros. */
const TINY = 1e-20;

// -- top-k mask

/**
 * Marks the k largest scores; ties go to the lower index. With `groups`, only experts of the `group_top_k` best groups are eligible; the value
 * of a group of adjacent experts is the sum of its `group_scores` largest scores.
 */
export const topKMask = op({
  name: "top_k_mask",
  sig: "x[B,S,E!] -> c[B,S,E!]",
  types: { c: "f32" },
  cpu({ x, c }, { E, ...limits }) {
    for (let o = 0; o < x.length; o += E) chooseAmong(x.subarray(o, o + E), c.subarray(o, o + E), limits);
  },
});
/** Marks the k largest x + sign · bias by the same rules. */
export const topKMaskBiased = op({
  name: "top_k_mask_biased",
  sig: "x[B,S,E!] bias[E!] -> c[B,S,E!]",
  types: { c: "f32" },
  cpu({ x, bias, c }, { E, sign, ...limits }) {
    const score = new Float32Array(E);
    for (let o = 0; o < x.length; o += E) {
      for (let e = 0; e < E; e++) score[e] = x[o + e]! + sign! * bias[e]!;
      chooseAmong(score, c.subarray(o, o + E), limits);
    }
  },
});
function chooseAmong(score: Float32Array, c: Float32Array, { k, groups = 1, group_top_k, group_scores }: Attrs): void {
  const size = score.length / groups;
  const open = new Uint8Array(score.length).fill(1);
  if (groups > 1) {
    const worth = Float32Array.from({ length: groups }, (_, g) => {
      const own = score.subarray(g * size, (g + 1) * size);
      const left = new Uint8Array(size).fill(1);
      let sum = 0;
      for (let i = 0; i < group_scores!; i++) sum = Math.fround(sum + own[largest(own, left)]!);
      return sum;
    });
    const left = new Uint8Array(groups).fill(1);
    for (let i = 0; i < group_top_k!; i++) largest(worth, left);
    for (let e = 0; e < open.length; e++) open[e] = 1 - left[Math.floor(e / size)]!;
  }
  for (let i = 0; i < k!; i++) {
    const best = largest(score, open);
    if (best >= 0) c[best] = 1;
  }
}
/** Returns the index of the largest open element (ties: the first) and closes it; −1 if no element is open. */
function largest(x: Float32Array, open: Uint8Array): number {
  let best = -1;
  for (let e = 0; e < open.length; e++) if (open[e] && (best < 0 ? x[e]! >= Number.NEGATIVE_INFINITY : x[e]! > x[best]!)) best = e;
  if (best >= 0) open[best] = 0;
  return best;
}

/** y = p · scale where c is 1, else 0; with `normalize`, divided by the sum of the chosen p. */
export const combineWeights = op({
  name: "combine_weights",
  sig: "p[B,S,E!] c[B,S,E!] -> y[B,S,E!]",
  types: { y: "f32" },
  cpu({ p, c, y }, { E, normalize, scale }) {
    for (let o = 0; o < y.length; o += E) {
      let sum = 0;
      for (let e = 0; e < E; e++) sum += c[o + e]! * p[o + e]!;
      const share = normalize ? scale! / (sum + TINY) : scale!;
      for (let e = 0; e < E; e++) y[o + e] = c[o + e]! * p[o + e]! * share;
    }
  },
  grad: ({ p, c }, { dy }, a): Grads => ({ p: combineWeightsGrad.of({ p, c, dy }, a) }),
});
/** dp = scale · dy for chosen experts; with `normalize`, y = scale · p/Σp gives dp = scale · (dy − Σ p·dy/Σp)/Σp. */
export const combineWeightsGrad = op({
  name: "combine_weights_grad",
  sig: "p[B,S,E!] c[B,S,E!] dy[B,S,E!] -> dp[B,S,E!]",
  cpu({ p, c, dy, dp }, { E, normalize, scale }) {
    for (let o = 0; o < dp.length; o += E) {
      let sum = 0;
      let dot = 0;
      for (let e = 0; e < E; e++) {
        sum += c[o + e]! * p[o + e]!;
        dot += c[o + e]! * p[o + e]! * dy[o + e]!;
      }
      const share = normalize ? scale! / (sum + TINY) : scale!;
      const mean = normalize ? dot / (sum + TINY) : 0;
      for (let e = 0; e < E; e++) dp[o + e] = c[o + e]! * (dy[o + e]! - mean) * share;
    }
  },
});
// -- z-loss, which keeps logits small (arXiv:2202.08906)

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
