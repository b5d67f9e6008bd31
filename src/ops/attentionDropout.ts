/**
 * Attention with dropped weights: after the softmax a weight is 0 with probability `drop`, else it is multiplied by 1 / (1 − drop). `lse` is
 * that of the softmax before dropout, so shards of the keys are combined by attention_merge as without dropout. These are separate ops because
 * their signatures have the additional input `sample`.
 */
import { type Arrays, backward, forward, gradients, mix, mixGrad, operands, outcome, results, type Sizes } from "./attention.ts";
import { dropsOf, runtimeAttrs } from "./dropout.ts";
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

/** Returns the factor of each weight: key u of a query uses word u % 4 at counter (sequence, position of the query, head, u / 4). */
export function keptOf(sample: Float32Array, { S, G, M, ...d }: DropSizes, p: ShardContext): (query: number, key: number) => number {
  const { threshold, factor } = dropsOf(d.drop);
  const [heads, firstHead] = [G * M, p.start("G") * M];
  const position = (dim: "S" | "U", i: number) => positionOf(p.start(dim) + i, d.chunk, d.ranks);
  const words = new Uint32Array(4);
  let [lastQuery, lastBlock] = [-1, -1];
  return (query, key) => {
    const at = position("U", key);
    const block = Math.floor(at / 4);
    if (query !== lastQuery || block !== lastBlock) {
      const token = Math.floor(query / heads);
      const here = position("S", token % S);
      philox(words, sample[Math.floor(token / S)]!, here, firstHead + (query % heads), block, d.key0, d.key1);
      [lastQuery, lastBlock] = [query, block];
    }
    return words[at % 4]! < threshold ? 0 : factor;
  };
}
