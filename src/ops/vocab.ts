/** Embedding and cross-entropy. V may be sharded: one shard holds the row of an id, and the loss is composed of partial values. */
import { add, div, log, rowMax as maxOfRow, mul, neg, sub, total, totalOver } from "./formula.ts";
import { formulaOp, type Grads, op } from "./op.ts";
import { idColumns, LOWEST, ofIds } from "./paddedVocab.ts";

/** y = the row of the embedding for each id; 0 for rows of other ranks. */
export const embed = op({
  name: "embed",
  sig: "ids[B,S] table[V,D] -> x[B,S,D]",
  cpu({ ids, table, x }, { V, D }, p) {
    here(ids, p.start("V"), V, (t, v) => x.set(table.subarray(v * D, v * D + D), t * D));
  },
  grad: ({ ids, table }, { dy }): Grads => ({ table: embedGrad.of({ ids, table, dy }) }),
});
/** Gradient with respect to the table, of which only the shape is read. */
export const embedGrad = op({
  name: "embed_grad",
  sig: "ids[B,S] table[V,D] dy[B,S,D] -> dtable[V,D]",
  suffix: "wgrad",
  types: { dtable: "f32" },
  cpu({ ids, dy, dtable }, { V, D }, p) {
    here(ids, p.start("V"), V, (t, v) => {
      for (let d = 0; d < D; d++) dtable[v * D + d]! += dy[t * D + d]!;
    });
  },
});
/** Visits each token whose id this shard of the vocabulary holds, with the local index of the id. */
function here(ids: Float32Array, start: number, V: number, visit: (t: number, v: number) => void): void {
  for (let t = 0; t < ids.length; t++) {
    const v = ids[t]! - start;
    if (v >= 0 && v < V) visit(t, v);
  }
}

// The loss as a sum of terms that are partial under a sharded V: −log softmax(x)[target] = log Σ exp(x − m) + m − x[target].
// The optional attribute `ids` is the number of ids: logits of further columns take no part (paddedVocab.ts).

/** The maximum of each row. */
export const rowMax = formulaOp({
  name: "row_max",
  sig: "x[B,S,V] -> m[B,S]",
  reduction: "max",
  types: { m: "f32" },
  formula: ({ x }, attrs) => ({ m: maxOfRow("most", ofIds(attrs, x, LOWEST)) }),
});
/**
 * What each shard of the vocabulary adds to the loss of a token: s, the sum of exp(x − m), and p, the logit of the target, which one shard
 * holds. `m` has no gradient: its contributions here and in `nll` cancel. It has no formula (formula.ts): p reads one element of a row, which
 * depends on the coordinate of the shard.
 */
export const softmaxTerms = op({
  name: "softmax_terms",
  sig: "x[B,S,V] m[B,S] target[B,S] -> s[B,S] p[B,S]",
  types: { s: "f32", p: "f32" },
  gradOutputs: ["s", "p"],
  cpu({ x, m, target, s, p }, { V, ...attrs }, place) {
    const end = idColumns(attrs, V, place.start("V"));
    for (let t = 0; t < s.length; t++) {
      let sum = 0;
      for (let v = 0; v < end; v++) sum += Math.exp(x[t * V + v]! - m[t]!);
      s[t] = sum;
    }
    here(target, place.start("V"), V, (t, v) => {
      p[t] = x[t * V + v]!;
    });
  },
  grad: ({ x, m, target }, { dys: [ds, dp] }, attrs): Grads => ({ x: softmaxTermsGrad.of({ x, m, target, ds: ds!, dp: dp! }, attrs) }),
});
/** The gradient of `softmaxTerms`. */
export const softmaxTermsGrad = op({
  name: "softmax_terms_grad",
  sig: "x[B,S,V] m[B,S] target[B,S] ds[B,S] dp[B,S] -> dx[B,S,V]",
  cpu({ x, m, target, ds, dp, dx }, { V, ...attrs }, place) {
    const end = idColumns(attrs, V, place.start("V"));
    for (let t = 0; t < ds.length; t++) for (let v = 0; v < end; v++) dx[t * V + v] = ds[t]! * Math.exp(x[t * V + v]! - m[t]!);
    here(target, place.start("V"), V, (t, v) => {
      dx[t * V + v]! += dp[t]!;
    });
  },
});
/** The negative log-likelihood of each label. */
export const nll = formulaOp({
  name: "nll",
  sig: "m[B,S] s[B,S] p[B,S] -> l[B,S]",
  types: { l: "f32" },
  formula: ({ m, s, p }) => ({ l: sub(add(log(s), m), p) }),
  grad({ s }, { dy }): Grads {
    const { ds, dp } = nllGrad.all({ s, dy });
    return { s: ds, p: dp };
  },
});
/** The gradient of `nll`. */
export const nllGrad = formulaOp({
  name: "nll_grad",
  sig: "s[B,S] dy[B,S] -> ds[B,S] dp[B,S]",
  formula: ({ s, dy }) => ({ ds: div(dy, s), dp: neg(dy) }),
});
/** Divides by the attribute `count`, the number of tokens of the job, because a shard has only its own tokens. */
export const mean = formulaOp({
  name: "mean",
  sig: "l[B,S] -> y[]",
  types: { y: "f32" },
  attrs: ["count"],
  formula: ({ l }, { count }) => ({ y: totalOver(l, count) }),
  grad: ({ l }, { dy }, a): Grads => ({ l: meanGrad.of({ l, dy }, a) }),
});
/** The gradient of `mean`. */
export const meanGrad = formulaOp({
  name: "mean_grad",
  sig: "l[B,S] dy[] -> dl[B,S]",
  attrs: ["count"],
  formula: ({ dy }, { count }) => ({ dl: div(dy, count) }),
});
/** Weighted mean of token losses; the weights contain the divisor, and are 0 for ignored tokens. */
export const weightedSum = formulaOp({
  name: "weighted_sum",
  sig: "l[B,S] weight[B,S] -> y[]",
  types: { y: "f32" },
  formula: ({ l, weight }) => ({ y: total(mul(l, weight)) }),
  grad: ({ weight }, { dy }): Grads => ({ l: weightedSumGrad.of({ weight, dy }) }),
});
/**
 * The weighted losses of tokens, added up by the source of the token: K, the number of sources, is an attribute. It has no gradient, since
 * only evaluations use it.
 */
export const sourceLosses = op({
  name: "source_losses",
  sig: "l[B,S] weight[B,S] source[B,S] -> y[K!]",
  types: { y: "f32" },
  cpu({ l, weight, source, y }) {
    for (let t = 0; t < l.length; t++) y[source[t]!]! += l[t]! * weight[t]!;
  },
});
/** The gradient of `weightedSum`. */
export const weightedSumGrad = formulaOp({
  name: "weighted_sum_grad",
  sig: "weight[B,S] dy[] -> dl[B,S]",
  formula: ({ weight, dy }) => ({ dl: mul(weight, dy) }),
});
