/**
 * The router: scores of all experts, the top-k mask c of ones and zeros, and the combine weights of the chosen experts. The mask has no
 * gradient: a small change of the scores does not change the choice.
 */
import {
  abs,
  add,
  div,
  type Expr,
  exp,
  greater,
  log,
  log1p,
  sigmoid as logistic,
  max,
  mul,
  neg,
  rowMax,
  rowSum,
  select,
  sqrt,
  sub,
  sumOfExponentials,
  type Term,
  total,
  variable,
} from "./formula.ts";
import { type Attrs, declared, formulaOp, type Grads, op } from "./op.ts";

// -- scores

/** Added to the sum in a denominator, as in Megatron Core, so that a sum of zeros gives zeros. */
const TINY = 1e-20;

/** log Σ eˣ over a row, without overflow. */
function logSumExp(x: Expr): Expr {
  const most = rowMax("most", x);
  return variable("log", add(most, log(sumOfExponentials(x, most))));
}

/** Softmax over experts. */
export const softmax = formulaOp({
  name: "softmax",
  sig: "x[B,S,E!] -> y[B,S,E!]",
  types: { y: "f32" },
  formula: ({ x }) => ({ y: exp(sub(x, logSumExp(x))) }),
  grad({ x }, { y, dy }): Grads {
    return { x: declared(softmaxGrad.of({ y, dy }), { dtype: x.dtype }) };
  },
});
/** The gradient of `softmax`. */
export const softmaxGrad = formulaOp({
  name: "softmax_grad",
  sig: "y[B,S,E!] dy[B,S,E!] -> dx[B,S,E!]",
  formula: ({ y, dy }) => ({ dx: mul(y, sub(dy, rowSum("dot", mul(y, dy)))) }),
});

/** The sigmoid of each score. */
export const sigmoid = formulaOp({
  name: "sigmoid",
  sig: "x[B,S,E] -> y[B,S,E]",
  types: { y: "f32" },
  formula: ({ x }) => ({ y: logistic(x) }),
  grad({ x }, { y, dy }): Grads {
    return { x: declared(sigmoidGrad.of({ y, dy }), { dtype: x.dtype }) };
  },
});
/** The gradient of `sigmoid`. */
export const sigmoidGrad = formulaOp({
  name: "sigmoid_grad",
  sig: "y[B,S,E] dy[B,S,E] -> dx[B,S,E]",
  formula: ({ y, dy }) => ({ dx: mul(dy, y, sub(1, y)) }),
});
/** √log(1 + eˣ) */
export const sqrtSoftplus = formulaOp({
  name: "sqrt_softplus",
  sig: "x[B,S,E] -> y[B,S,E]",
  types: { y: "f32" },
  formula: ({ x }) => ({ y: sqrt(add(max(x, 0), log1p(exp(neg(abs(x)))))) }),
  grad: ({ x }, { y, dy }): Grads => ({ x: sqrtSoftplusGrad.of({ x, y, dy }) }),
});
/** dx = dy · σ(x)/(2y); 0 where y underflowed to 0. */
export const sqrtSoftplusGrad = formulaOp({
  name: "sqrt_softplus_grad",
  sig: "x[B,S,E] y[B,S,E] dy[B,S,E] -> dx[B,S,E]",
  formula: ({ x, y, dy }) => ({ dx: select(greater(y, 0), div(mul(dy, logistic(x)), mul(2, y)), 0) }),
});

/** Divides the scores of a token by their sum. Softmax scores are normalised already. */
export const normalize = formulaOp({
  name: "normalize",
  sig: "p[B,S,E!] -> y[B,S,E!]",
  formula: ({ p }) => ({ y: div(p, add(rowSum("sum", p), TINY)) }),
  grad: ({ p }, { dy }): Grads => ({ p: normalizeGrad.of({ p, dy }) }),
});
/** dp = (dy − Σ p·dy/Σp)/Σp */
export const normalizeGrad = formulaOp({
  name: "normalize_grad",
  sig: "p[B,S,E!] dy[B,S,E!] -> dp[B,S,E!]",
  formula({ p, dy }) {
    const sum = variable("share", add(rowSum("sum", p), TINY));
    const mean = variable("mean", div(rowSum("dot", mul(p, dy)), sum));
    return { dp: div(sub(dy, mean), sum) };
  },
});

// -- top-k mask

/**
 * Marks the k largest scores; ties go to the lower index. With `groups`, only experts of the `group_top_k` best groups are eligible; the value
 * of a group of adjacent experts is the sum of its `group_scores` largest scores.
 */
export const topKMask = op({
  name: "top_k_mask",
  sig: "x[B,S,E!] -> c[B,S,E!]",
  attrs: ["k"],
  types: { c: "f32" },
  cpu({ x, c }, { E, ...limits }) {
    for (let o = 0; o < x.length; o += E) chooseAmong(x.subarray(o, o + E), c.subarray(o, o + E), limits);
  },
});
/** Marks the k largest x + sign · bias by the same rules. */
export const topKMaskBiased = op({
  name: "top_k_mask_biased",
  sig: "x[B,S,E!] bias[E!] -> c[B,S,E!]",
  attrs: ["k", "sign"],
  types: { c: "f32" },
  cpu({ x, bias, c }, { E, sign, ...limits }) {
    const score = new Float32Array(E);
    for (let o = 0; o < x.length; o += E) {
      for (let e = 0; e < E; e++) score[e] = x[o + e]! + sign * bias[e]!;
      chooseAmong(score, c.subarray(o, o + E), limits);
    }
  },
});
/** How many experts a token takes, and how many groups of experts it chooses from. */
type Limits = { readonly k: number } & Attrs;

function chooseAmong(score: Float32Array, c: Float32Array, { k, groups = 1, group_top_k = 1, group_scores = 0 }: Limits): void {
  const size = score.length / groups;
  const open = new Uint8Array(score.length).fill(1);
  if (groups > 1) {
    const worth = Float32Array.from({ length: groups }, (_, g) => {
      const own = score.subarray(g * size, (g + 1) * size);
      const left = new Uint8Array(size).fill(1);
      let sum = 0;
      for (let i = 0; i < group_scores; i++) sum = Math.fround(sum + own[largest(own, left)]!);
      return sum;
    });
    const left = new Uint8Array(groups).fill(1);
    for (let i = 0; i < group_top_k; i++) largest(worth, left);
    for (let e = 0; e < open.length; e++) open[e] = 1 - left[Math.floor(e / size)]!;
  }
  for (let i = 0; i < k; i++) {
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
export const combineWeights = formulaOp({
  name: "combine_weights",
  sig: "p[B,S,E!] c[B,S,E!] -> y[B,S,E!]",
  types: { y: "f32" },
  attrs: ["normalize", "scale"],
  formula: ({ p, c }, a) => ({ y: mul(c, p, shareOf(p, c, a)) }),
  grad: ({ p, c }, { dy }, a): Grads => ({ p: combineWeightsGrad.of({ p, c, dy }, a) }),
});
/** dp = scale · dy for chosen experts; with `normalize`, y = scale · p/Σp gives dp = scale · (dy − Σ p·dy/Σp)/Σp. */
export const combineWeightsGrad = formulaOp({
  name: "combine_weights_grad",
  sig: "p[B,S,E!] c[B,S,E!] dy[B,S,E!] -> dp[B,S,E!]",
  attrs: ["normalize", "scale"],
  formula({ p, c, dy }, a) {
    const share = shareOf(p, c, a);
    if (!a.normalize) return { dp: mul(c, dy, share) };
    const mean = variable("mean", div(rowSum("dot", mul(c, p, dy)), add(chosenSum(p, c), TINY)));
    return { dp: mul(c, sub(dy, mean), share) };
  },
});
const chosenSum = (p: Expr, c: Expr): Expr => rowSum("sum", mul(c, p));
/** The factor of each chosen weight: with `normalize`, they sum to the scaling factor. */
const shareOf = (p: Expr, c: Expr, { normalize, scale }: Readonly<Record<"normalize" | "scale", number>>): Term =>
  normalize ? variable("share", div(scale, add(chosenSum(p, c), TINY))) : scale;

// -- z-loss, which keeps logits small (arXiv:2202.08906)

/** c · Σ logsumexp(x)² */
export const zLoss = formulaOp({
  name: "z_loss",
  sig: "x[B,S,E!] -> y[]",
  types: { y: "f32" },
  attrs: ["c"],
  formula({ x }, { c }) {
    const log = logSumExp(x);
    return { y: total(mul(log, log), c) };
  },
  grad: ({ x }, { dy }, a): Grads => ({ x: zLossGrad.of({ x, dy }, a) }),
});
/** dx = 2c · logsumexp(x) · softmax(x) */
export const zLossGrad = formulaOp({
  name: "z_loss_grad",
  sig: "x[B,S,E!] dy[] -> dx[B,S,E!]",
  attrs: ["c"],
  formula({ x, dy }, { c }) {
    const log = logSumExp(x);
    return { dx: mul(2 * c, dy, log, exp(sub(x, log))) };
  },
});

/** c · Σ over tokens of the entropy of the scores as shares: log Σ p − Σ p·log p / Σ p, in nats. It has no gradient. */
export const routerEntropy = formulaOp({
  name: "router_entropy",
  sig: "p[B,S,E!] -> y[]",
  types: { y: "f32" },
  attrs: ["c"],
  formula({ p }, { c }) {
    const sum = add(rowSum("sum", p), TINY);
    return { y: total(sub(log(sum), div(rowSum("information", select(greater(p, 0), mul(p, log(p)), 0)), sum)), c) };
  },
});
