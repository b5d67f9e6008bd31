/** The mixture-of-experts models of torchtitan. A configuration names a flavor; its sizes stand in torchtitan's code. */

/** Latent attention; `queryRank` 0: queries are made from the residual stream. */
interface Latent {
  readonly queryRank: number;
  readonly kvRank: number;
  readonly nopeDim: number;
  readonly ropeDim: number;
  readonly vDim: number;
}

/** A flavor of a model. */
export interface Flavor {
  readonly layers: number;
  readonly hidden: number;
  readonly ffn: number;
  readonly heads: number;
  readonly vocab: number;
  readonly eps: number;
  readonly theta: number;
  /** Grouped-query attention with norms of queries and keys, or latent attention. */
  readonly attention: { readonly kvHeads: number; readonly headDim: number } | Latent;
  /** YaRN over 4096 tokens by 40; it sets in with longer sequences alone. */
  readonly mscale?: number;
  readonly experts: number;
  readonly topK: number;
  readonly expertFfn: number;
  /** Shared experts, each of the width of one expert. */
  readonly shared: number;
  readonly firstDense: number;
  readonly score: "softmax" | "sigmoid";
  readonly normalize: boolean;
  readonly scaling: number;
  readonly groups?: { readonly count: number; readonly chosen: number };
}

const latent = (queryRank: number): Latent => ({ queryRank, kvRank: 512, nopeDim: 128, ropeDim: 64, vDim: 128 });

const deepseek = { eps: 1e-5, theta: 10000, score: "softmax", normalize: false, scaling: 1, firstDense: 1, shared: 2 } as const;

const qwen = {
  ...{ vocab: 151936, eps: 1e-6, attention: { kvHeads: 4, headDim: 128 }, experts: 128, topK: 8 },
  ...{ shared: 0, firstDense: 0, score: "softmax" as const, normalize: true, scaling: 1 },
};

/** Flavors by the name of the model. */
export const flavors: Readonly<Record<string, Readonly<Record<string, Flavor>>>> = {
  deepseek_v3: {
    debugmodel: {
      ...deepseek,
      ...{ layers: 6, hidden: 256, ffn: 1024, heads: 16, vocab: 2048, attention: latent(0), mscale: 0.7 },
      ...{ experts: 8, topK: 3, expertFfn: 256 },
    },
    "16B": {
      ...deepseek,
      ...{ layers: 27, hidden: 2048, ffn: 10944, heads: 16, vocab: 102400, attention: latent(0), mscale: 0.7 },
      ...{ experts: 64, topK: 6, expertFfn: 1408 },
    },
    "236B": {
      ...deepseek,
      ...{ layers: 60, hidden: 5120, ffn: 12288, heads: 128, vocab: 102400, attention: latent(1536), mscale: 1 },
      ...{ experts: 160, topK: 6, expertFfn: 1536, scaling: 16, groups: { count: 8, chosen: 3 } },
    },
    "671B": {
      ...deepseek,
      ...{ layers: 61, hidden: 7168, ffn: 18432, heads: 128, vocab: 129280, attention: latent(1536), mscale: 1 },
      ...{ experts: 256, topK: 8, expertFfn: 2048, shared: 1, firstDense: 3 },
      ...{ score: "sigmoid", normalize: true, scaling: 2.5, groups: { count: 8, chosen: 4 } },
    },
  },
  qwen3: {
    "30B-A3B": { ...qwen, layers: 48, hidden: 2048, ffn: 6144, heads: 32, expertFfn: 768, theta: 1e6 },
    "235B-A22B": { ...qwen, layers: 94, hidden: 4096, ffn: 12288, heads: 64, expertFfn: 1536, theta: 5e6 },
  },
};
