/**
 * Tables of the model families of Hugging Face transformers: defaults of missing keys, names of keys, and unsupported features.
 */

/** A model family. */
export interface Family {
  readonly kvHeads: number | "heads";
  readonly headDim: number | "quotient";
  readonly theta: number;
  readonly eps: number;
  readonly qkNorm: "none" | "head" | "full";
  /** Keys of the biases of q, k and v, or of these and the output projection; and their defaults. */
  readonly bias: null | { readonly key: string | null; readonly of: "qkv" | "all"; readonly otherwise: boolean };
  /** The key of the attention window, and the key that enables it. */
  readonly window: null | { readonly otherwise: number | null; readonly only?: string };
  readonly latent: null | { readonly queryRank: number; readonly interleaved: boolean | string };
  readonly moe: null | Experts;
  /** Features of all models of the family that rankc lacks. */
  readonly never?: readonly string[];
}

/** The keys of a family with experts. */
export interface Experts {
  /** Keys of the number of experts, newest first. */
  readonly count: readonly string[];
  readonly ffn: string;
  readonly score: "softmax" | "sigmoid";
  readonly normalize: boolean | { readonly key: string; readonly otherwise: boolean };
  /** The key of the balancing loss's coefficient and its default; the key that makes it a loss of each sequence, true where it is missing. */
  readonly aux: { readonly key: string; readonly otherwise: number; readonly perSequence: string | null };
  /** Logits in f32, from widened input and weights. */
  readonly exact: boolean;
  readonly scaling: null | number;
  readonly groups: null | {
    readonly count: number | null;
    readonly chosen: number | null;
    readonly scores: number;
    readonly method?: string;
  };
  readonly expertBias: boolean;
  readonly shared:
    | null
    | { readonly widths: string; readonly gate: false; readonly otherwise: number }
    | { readonly ffn: string; readonly gate: true };
  /** The layers with experts: all; all after the first ones; or a selection by two keys. */
  readonly layers: "all" | { readonly after: string; readonly otherwise: number } | "sparse_step";
}

const dense = { headDim: "quotient", qkNorm: "none", bias: null, window: null, latent: null, moe: null } as const;
const own = { exact: false, scaling: null, groups: null, expertBias: false, shared: null, layers: "all" } as const;
const windowIfAsked = { otherwise: 4096, only: "use_sliding_window" } as const;
const biasIfAsked = { key: "attention_bias", of: "all", otherwise: false } as const;

const routerAux = (otherwise: number) => ({ key: "router_aux_loss_coef", otherwise, perSequence: null });

const qwenExperts = {
  ...own,
  count: ["num_local_experts", "num_experts"],
  ffn: "moe_intermediate_size",
  score: "softmax",
  normalize: { key: "norm_topk_prob", otherwise: false },
  aux: routerAux(0.001),
  layers: "sparse_step",
} as const;
const deepseek = { ...dense, kvHeads: "heads", theta: 1e4, eps: 1e-6 } as const;
const deepseekExperts = {
  count: ["n_routed_experts"],
  ffn: "moe_intermediate_size",
  aux: { key: "aux_loss_alpha", otherwise: 0, perSequence: "seq_aux" },
  exact: true,
  shared: { widths: "n_shared_experts", gate: false },
} as const;

/** The supported families, by model_type. */
export const families: Readonly<Record<string, Family>> = {
  llama: { ...dense, kvHeads: "heads", theta: 1e4, eps: 1e-6, bias: biasIfAsked },
  mistral: { ...dense, kvHeads: 8, theta: 1e4, eps: 1e-6, window: { otherwise: 4096 } },
  qwen2: { ...dense, kvHeads: 32, theta: 1e4, eps: 1e-6, bias: { key: null, of: "qkv", otherwise: true }, window: windowIfAsked },
  qwen3: { ...dense, kvHeads: 32, headDim: 128, theta: 1e4, eps: 1e-6, qkNorm: "head", bias: biasIfAsked, window: windowIfAsked },
  mixtral: {
    ...dense,
    kvHeads: 8,
    theta: 1e6,
    eps: 1e-5,
    window: { otherwise: null },
    moe: { ...own, count: ["num_local_experts"], ffn: "intermediate_size", score: "softmax", normalize: true, aux: routerAux(0.001) },
  },
  olmoe: {
    ...dense,
    kvHeads: "heads",
    theta: 1e4,
    eps: 1e-5,
    qkNorm: "full",
    bias: biasIfAsked,
    moe: {
      ...own,
      count: ["num_experts", "num_local_experts"],
      ffn: "intermediate_size",
      score: "softmax",
      normalize: { key: "norm_topk_prob", otherwise: false },
      aux: routerAux(0.01),
    },
  },
  qwen2_moe: {
    ...dense,
    kvHeads: 16,
    theta: 1e4,
    eps: 1e-6,
    bias: { key: "qkv_bias", of: "qkv", otherwise: true },
    window: windowIfAsked,
    moe: { ...qwenExperts, shared: { ffn: "shared_expert_intermediate_size", gate: true } },
  },
  qwen3_moe: {
    ...dense,
    kvHeads: 4,
    theta: 1e4,
    eps: 1e-6,
    qkNorm: "head",
    bias: biasIfAsked,
    window: windowIfAsked,
    moe: qwenExperts,
  },
  deepseek_v2: {
    ...deepseek,
    latent: { queryRank: 1536, interleaved: true },
    moe: {
      ...deepseekExperts,
      score: "softmax",
      // with norm_topk_prob: true, DeepSeek's code normalises and transformers does not: such a config is refused
      normalize: false,
      scaling: 1,
      groups: { count: null, chosen: null, scores: 1, method: "topk_method" },
      expertBias: false,
      shared: { ...deepseekExperts.shared, otherwise: 2 },
      layers: { after: "first_k_dense_replace", otherwise: 0 },
    },
  },
  deepseek_v3: {
    ...deepseek,
    latent: { queryRank: 1536, interleaved: "rope_interleave" },
    moe: {
      ...deepseekExperts,
      score: "sigmoid",
      normalize: { key: "norm_topk_prob", otherwise: true },
      scaling: 2.5,
      groups: { count: 8, chosen: 4, scores: 2 },
      expertBias: true,
      shared: { ...deepseekExperts.shared, otherwise: 1 },
      layers: { after: "first_k_dense_replace", otherwise: 3 },
    },
  },
  gpt_oss: {
    ...dense,
    kvHeads: 8,
    headDim: 64,
    theta: 150000,
    eps: 1e-5,
    bias: { key: "attention_bias", of: "all", otherwise: true },
    window: { otherwise: 128 },
    moe: {
      ...own,
      count: ["num_local_experts", "num_experts"],
      ffn: "intermediate_size",
      score: "softmax",
      normalize: true,
      aux: routerAux(0.001),
    },
    never: [
      "self_attn.sinks are not supported: softmax here is over the keys alone",
      "swiglu_limit is not supported: gate and up are not clamped, and silu has no other slope",
      "mlp.experts.gate_up_proj_bias and down_proj_bias are not supported: experts have no biases",
      "mlp.router.bias is not supported: the router has no bias",
    ],
  },
};

/** Model types that equal another type. */
export const aliases: Readonly<Record<string, string>> = { kimi_k2: "deepseek_v3" };

/** Keys that must be off, and the feature that rankc lacks for each. */
export const mustBeOff: Readonly<Record<string, string>> = {
  mlp_bias: "the feed-forward part has no bias",
  clip_qkv: "queries, keys and values are not clipped",
  router_jitter_noise: "what is perturbed here is the router's input alone, and there that of the experts, too",
};

/** Keys with one supported value. */
export const mustBe: Readonly<Record<string, Readonly<Record<string, { readonly value: unknown; readonly why: string }>>>> = {
  deepseek_v2: {
    norm_topk_prob: {
      value: false,
      why: "transformers leaves it out, while DeepSeek's own code normalises and drops routed_scaling_factor",
    },
    moe_layer_freq: { value: 1, why: "all layers after first_k_dense_replace have experts" },
    scoring_func: { value: "softmax", why: "scores are softmax" },
  },
  deepseek_v3: {
    topk_method: { value: "noaux_tc", why: "experts are chosen by sigmoid and bias, in groups" },
    moe_layer_freq: { value: 1, why: "all layers after first_k_dense_replace have experts" },
    scoring_func: { value: "sigmoid", why: "scores are sigmoids" },
  },
};
