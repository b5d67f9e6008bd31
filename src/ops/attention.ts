/** Causal grouped-query attention over all keys or over a shard of them. Positions are global on every shard. */
import { type Grads, op, type ShardContext } from "./op.ts";
import { positionOf } from "./positions.ts";

/** Float32 arrays by name. */
export type Arrays<Names extends string> = Readonly<Record<Names, Float32Array>>;
/**
 * Queries and keys have width C, values and outputs W. Query head g·M + m reads key head ⌊g/copies⌋: groups that share a key head may be on
 * different ranks, each of which holds a copy of that head. `scale`, `chunk` and `ranks` are attributes.
 */
export type Sizes = Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C" | "W" | "scale" | "chunk" | "ranks", number>>;

/** Operands of signatures: queries, then all keys and values, or a shard of them. */
export const operands = {
  all: "q[B,S,G*M*C] k[B,U!,G/copies*C] v[B,U!,G/copies*W]",
  shard: "q[B,S,G*M*C] k[B,U,G/copies*C] v[B,U,G/copies*W]",
} as const;
/** The results of attention, in signatures. */
export const results = "o[B,S,G*M*W] lse[B,S,G*M]";
/** The results and the gradient of `o`, which the gradient of attention reads. */
export const outcome = `${results} dy[B,S,G*M*W]` as const;
/** The gradients of `operands`. */
export const gradients = {
  all: "dq[B,S,G*M*C] dk[B,U!,G/copies*C] dv[B,U!,G/copies*W]",
  shard: "dq[B,S,G*M*C] dk[B,U,G/copies*C] dv[B,U,G/copies*W]",
} as const;
/** What declarations of attention have in common. */
export const forward = { attrs: ["scale", "chunk", "ranks"], types: { lse: "f32" }, flops: flopsOfMix } as const;
/** What declarations of the gradient of attention have in common. */
export const backward = { attrs: forward.attrs, flops: flopsOfGrad } as const;

/**
 * A query attends to the keys at its own and earlier positions; scores are scale·q·k. `lse` is the log-sum-exp of a query's scores, which
 * the gradient reads. With a `chunk`, queries and keys are in zigzag order over `ranks` ranks (positions.ts).
 */
export const attention = op({
  name: "attention",
  sig: `${operands.all} -> ${results}`,
  ...forward,
  cpu: mix,
  grad({ q, k, v }, { y, dy }, a): Grads {
    const { dq, dk, dv } = attentionGrad.all({ q, k, v, o: y, lse: y.node!.outs[1]!, dy }, a);
    return { q: dq, k: dk, v: dv };
  },
});
/**
 * With weights w = exp(score − lse) of one query: dv = w·dy; dw = dy·v; softmax gradient ds = w·(dw − Σ w·dw), where Σ w·dw = o·dy;
 * dq = Σ ds·scale·k, dk = ds·scale·q.
 */
export const attentionGrad = op({
  name: "attention_grad",
  sig: `${operands.all} ${outcome} -> ${gradients.all}`,
  ...backward,
  cpu: mixGrad,
});

/**
 * Attention to a shard of the keys, used by ring attention; attention_merge combines the results of two shards. A query that attends to no key
 * of the shard has o = 0 and lse = −∞.
 */
export const attentionPart = op({
  name: "attention_part",
  sig: `${operands.shard} -> ${results}`,
  ...forward,
  reduction: "merge",
  cpu: mix,
});
/** Gradient of attention to a shard of the keys. `o` and `lse` are those of all keys, so gradients of queries are partial sums over the shards. */
export const attentionPartGrad = op({
  name: "attention_part_grad",
  sig: `${operands.shard} ${outcome} -> ${gradients.shard}`,
  ...backward,
  cpu: mixGrad,
});
/**
 * Combines attention to two shards of the keys. Where both have lse = −∞, so has the result, with o = 0. It has no formula (formula.ts): the rows
 * of a formula are the last dim, and here a row is a head within it.
 */
export const attentionMerge = op({
  name: "attention_merge",
  sig: "a[B,S,H*W] la[B,S,H] b[B,S,H*W] lb[B,S,H] -> o[B,S,H*W] lse[B,S,H]",
  types: { lse: "f32" },
  cpu({ a, la, b, lb, o, lse }, { B, S, H, W }) {
    for (let i = 0; i < B * S * H; i++) {
      const most = Math.max(la[i]!, lb[i]!);
      if (most === -Infinity) {
        lse[i] = most;
        o.fill(0, i * W, i * W + W);
        continue;
      }
      const [wa, wb] = [Math.exp(la[i]! - most), Math.exp(lb[i]! - most)];
      lse[i] = most + Math.log(wa + wb);
      for (let c = i * W; c < i * W + W; c++) o[c] = (wa * a[c]! + wb * b[c]!) / (wa + wb);
    }
  },
});

// per head one product of 2·S·U·C and one of 2·S·U·W, half of which causality skips; for shards of the keys this holds for their sum
/** Returns the operations of attention: two products over the pairs of query and key. */
function flopsOfMix({ B, S, U, G, M, C, W }: Sizes): number {
  return (2 * B * S * U * G * M * (C + W)) / 2;
}
// five products: the recomputed scores, dq and dk of width C; dw and dv of width W
/** Returns the operations of its gradient: five products. */
function flopsOfGrad({ B, S, U, G, M, C, W }: Sizes): number {
  return (2 * B * S * U * G * M * (3 * C + 2 * W)) / 2;
}

/** How the ops with further inputs differ. */
interface MixVariant {
  /** The factor of a weight after the softmax, by query head and local key; default: 1. */
  readonly kept?: (query: number, key: number) => number;
  /** [B,S]: the position at which the document of each query begins; earlier keys are invisible to it. */
  readonly documents?: Float32Array;
}

/** Computes attention of a shard. `kept`: the dropout factor of a weight. */
export function mix(
  { q, k, v, o, lse }: Arrays<"q" | "k" | "v" | "o" | "lse">,
  d: Sizes,
  p: ShardContext,
  { kept, documents }: MixVariant = {},
): void {
  const { C, W } = d;
  const K = keyHeadsOf(k, d);
  const weight = new Float64Array(d.U);
  const mean = new Float64Array(W);
  eachQuery(d, K, p, documents, (i, keys, seen) => {
    let most = -Infinity;
    for (let j = 0; j < seen.length; j++) {
      weight[j] = d.scale * dot(q, i * C, k, (keys + seen[j]! * K) * C, C);
      most = Math.max(most, weight[j]!);
    }
    let sum = 0;
    for (let j = 0; j < seen.length; j++) sum += weight[j] = Math.exp(weight[j]! - most);
    // −∞ without keys
    lse[i] = most + Math.log(sum);
    mean.fill(0);
    for (let j = 0; j < seen.length; j++) {
      const w = (weight[j]! / sum) * (kept?.(i, seen[j]!) ?? 1);
      const at = (keys + seen[j]! * K) * W;
      for (let c = 0; c < W; c++) mean[c]! += w * v[at + c]!;
    }
    o.set(mean, i * W);
  });
}

type GradArrays = Arrays<"q" | "k" | "v" | "o" | "lse" | "dy" | "dq" | "dk" | "dv">;
/** Computes the gradient of attention of a shard. */
export function mixGrad(
  { q, k, v, o, lse, dy, dq, dk, dv }: GradArrays,
  d: Sizes,
  p: ShardContext,
  { kept, documents }: MixVariant = {},
): void {
  const { C, W } = d;
  const K = keyHeadsOf(k, d);
  const query = new Float64Array(C);
  // many queries contribute to one key: the sum stays in double precision until the end
  const keySums = new Float64Array(dk.length);
  const valueSums = new Float64Array(dv.length);
  eachQuery(d, K, p, documents, (i, keys, seen) => {
    const mean = dot(dy, i * W, o, i * W, W);
    query.fill(0);
    for (let j = 0; j < seen.length; j++) {
      const key = (keys + seen[j]! * K) * C;
      const value = (keys + seen[j]! * K) * W;
      const w = Math.exp(d.scale * dot(q, i * C, k, key, C) - lse[i]!);
      const f = kept?.(i, seen[j]!) ?? 1;
      const ds = d.scale * w * (f * dot(dy, i * W, v, value, W) - mean);
      for (let c = 0; c < C; c++) {
        query[c]! += ds * k[key + c]!;
        keySums[key + c]! += ds * q[i * C + c]!;
      }
      for (let c = 0; c < W; c++) valueSums[value + c]! += f * w * dy[i * W + c]!;
    }
    dq.set(query, i * C);
  });
  dk.set(keySums);
  dv.set(valueSums);
}

/** Number of local key heads: fewer than G where groups share a head. */
const keyHeadsOf = (k: Float32Array, { B, U, C }: Sizes): number => k.length / (B * U * C);

/** Visits each query head: its index, the index of its head in the first key (the next key is K further), and the local keys it attends to. */
function eachQuery(
  { B, S, U, G, M, ...d }: Sizes,
  K: number,
  p: ShardContext,
  documents: Float32Array | undefined,
  visit: (i: number, keys: number, seen: Int32Array) => void,
): void {
  const position = (dim: string, i: number) => positionOf(p.start(dim) + i, d.chunk, d.ranks);
  const of = Int32Array.from({ length: U }, (_, u) => position("U", u));
  const every = Int32Array.from(of.keys());
  for (let s = 0; s < S; s++) {
    const here = position("S", s);
    const earlier = every.filter((u) => of[u]! <= here);
    for (let b = 0; b < B; b++) {
      const seen = documents ? earlier.filter((u) => of[u]! >= documents[b * S + s]!) : earlier;
      for (let h = 0; h < G * M; h++) visit((b * S + s) * G * M + h, b * U * K + Math.floor((h * K) / (G * M)), seen);
    }
  }
}

function dot(a: Float32Array, at: number, b: Float32Array, bt: number, width: number): number {
  let sum = 0;
  for (let c = 0; c < width; c++) sum += a[at + c]! * b[bt + c]!;
  return sum;
}
