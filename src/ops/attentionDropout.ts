/**
 * Attention with dropped weights: after the softmax a weight is 0 with probability `drop`, else it is multiplied by 1 / (1 − drop). `lse` is
 * that of the softmax before dropout, so shards of the keys are combined by attention_merge as without dropout. These are separate ops because
 * their signatures have the additional input `sample`.
 */
import { type Arrays, backward, forward, gradients, mix, mixGrad, operands, outcome, results, type Sizes } from "./attention.ts";
import { runtimeAttrs } from "./dropout.ts";
import { type Grads, op, type ShardContext } from "./op.ts";
import { philox } from "./philox.ts";
import { positionOf } from "./positions.ts";

const attrs = ["scale", "drop", "chunk", "ranks"] as const;
/** What declarations of attention with dropout have in common. */
export const dropForward = { ...forward, attrs, runtimeAttrs } as const;
/** What declarations of its gradient have in common. */
export const dropBackward = { ...backward, attrs, runtimeAttrs } as const;

/** Causal attention with dropout of weights. */
export const attentionDropout = op({
  name: "attention_dropout",
  sig: `${operands.all} sample[B] -> ${results}`,
  ...dropForward,
  cpu: dropMix,
  grad({ q, k, v, sample }, { y, dy }, a): Grads {
    const { dq, dk, dv } = attentionDropoutGrad.all({ q, k, v, sample, o: y, lse: y.node!.outs[1]!, dy }, a);
    return { q: dq, k: dk, v: dv };
  },
});
/** With the factor f = 0 or 1 / (1 − drop) of each weight: dv = f·w·dy; dw = f·(dy·v); Σ w·dw = o·dy holds as without dropout. */
export const attentionDropoutGrad = op({
  name: "attention_dropout_grad",
  sig: `${operands.all} sample[B] ${outcome} -> ${gradients.all}`,
  ...dropBackward,
  cpu: dropMixGrad,
});
/** The same for a shard of the keys. */
export const attentionDropoutPart = op({
  name: "attention_dropout_part",
  sig: `${operands.shard} sample[B] -> ${results}`,
  ...dropForward,
  reduction: "merge",
  cpu: dropMix,
});
/** The gradient of `attentionDropoutPart`. */
export const attentionDropoutPartGrad = op({
  name: "attention_dropout_part_grad",
  sig: `${operands.shard} sample[B] ${outcome} -> ${gradients.shard}`,
  ...dropBackward,
  cpu: dropMixGrad,
});

/** The sizes, the probability of dropout and the key of its random numbers. */
export type DropSizes = Sizes & Readonly<Record<"drop" | "key0" | "key1", number>>;

function dropMix(t: Arrays<"q" | "k" | "v" | "sample" | "o" | "lse">, d: DropSizes, p: ShardContext): void {
  mix(t, d, p, { kept: keptOf(t.sample, d, p) });
}
function dropMixGrad(t: Arrays<"q" | "k" | "v" | "sample" | "o" | "lse" | "dy" | "dq" | "dk" | "dv">, d: DropSizes, p: ShardContext): void {
  mixGrad(t, d, p, { kept: keptOf(t.sample, d, p) });
}

/** Bits of a random number that decide about a weight. Half of a word has one bit more: the lower 15 bits of both halves are compared at once, as f16. */
const BITS = 15;

/**
 * Returns `threshold` and `factor` for a drop probability: a weight with a random number of 15 bits below `threshold` is dropped. The probability is
 * thus rounded to a multiple of 2^-15. Kept weights are multiplied by `factor`, 1 / (1 − the rounded probability), which preserves the mean.
 */
export function weightDropsOf(drop: number): { readonly threshold: number; readonly factor: number } {
  const threshold = Math.min(2 ** BITS - 1, Math.round(drop * 2 ** BITS));
  return { threshold, factor: 1 / (1 - threshold / 2 ** BITS) };
}

/**
 * Returns the factor of each weight. One call of Philox serves eight weights: of the queries at positions s and s + 8 and the keys at u, u + 1, u + 8 and
 * u + 9, where s mod 16 < 8, u mod 16 < 8 and u is even. A thread of a tensor core's product holds such eight sums, in the forward pass as in the
 * gradient. The counter is (sequence, 8·⌊s/16⌋ + s mod 8, head, 4·⌊u/16⌋ + ⌊u mod 8 / 2⌋). Words 0 and 2 are of s, 1 and 3 of s + 8; words 0 and 1
 * of u (lower half) and u + 1 (upper half), 2 and 3 of u + 8 and u + 9.
 */
export function keptOf(sample: Float32Array, { S, G, M, ...d }: DropSizes, p: ShardContext): (query: number, key: number) => number {
  const { threshold, factor } = weightDropsOf(d.drop);
  const [heads, firstHead] = [G * M, p.start("G") * M];
  const position = (dim: "S" | "U", i: number) => positionOf(p.start(dim) + i, d.chunk, d.ranks);
  /** The words of a query and 16 keys, four of each call. */
  const calls = [0, 1, 2, 3].map(() => new Uint32Array(4));
  let [lastQuery, lastBlock, lastPosition] = [-1, -1, 0];
  return (query, key) => {
    const at = position("U", key);
    const block = Math.floor(at / 16);
    if (query !== lastQuery || block !== lastBlock) {
      const token = Math.floor(query / heads);
      lastPosition = position("S", token % S);
      const row = Math.floor(lastPosition / 16) * 8 + (lastPosition % 8);
      for (const [n, words] of calls.entries())
        philox(words, sample[Math.floor(token / S)]!, row, firstHead + (query % heads), 4 * block + n, d.key0, d.key1);
      [lastQuery, lastBlock] = [query, block];
    }
    const word = calls[(at % 8) >> 1]![((at >> 3) % 2) * 2 + ((lastPosition >> 3) % 2)]!;
    return ((word >>> ((at % 2) * 16)) & (2 ** BITS - 1)) < threshold ? 0 : factor;
  };
}
