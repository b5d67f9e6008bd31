/** The models of `rankc init`: sizes as their authors published them, and usual settings of a pre-training run. */
import type { z } from "zod";
import type { JobText } from "../../../schemas/job.ts";

/** A model with the settings that a job for it starts with. */
export interface ModelPreset {
  /** The name of the model in full. */
  readonly label: string;
  readonly model: z.input<typeof JobText>["model"];
  /** The largest learning rate. */
  readonly lr: number;
  /** Sequences of one step. */
  readonly batch: number;
  /** The standard deviation of initial weights. */
  readonly std: number;
  /** Optimizer steps; default 100,000. */
  readonly steps?: number;
}

const llama = { seq: 8192, norm: { eps: 1e-5 }, rope: { theta: 5e5 }, vocab: 128256 };
const qwen = { seq: 4096, norm: { eps: 1e-6 }, rope: { theta: 1e6 }, vocab: 151936, qk_norm: "head", head_dim: 128 } as const;
const qwenExperts = { experts: 128, top_k: 8, router: { precision: "fp32", aux_coeff: 1e-3 } } as const;
const mistral = { norm: { eps: 1e-5 }, head_dim: 128, kv_heads: 8, seq: 4096 };
const mixtralExperts = { experts: 8, top_k: 2, router: { aux_coeff: 1e-2 } } as const;
const latent = { kv_rank: 512, nope_dim: 128, rope_dim: 64, v_dim: 128 };
const deepseek = { seq: 4096, norm: { eps: 1e-6 }, rope: { theta: 1e4, interleaved: true } };
/** Routing of DeepSeek-V3: sigmoids with a bias, and a small loss for each sequence. */
const biased = { score: "sigmoid", precision: "fp32", expert_bias: true, balance: "seq_aux_loss", aux_coeff: 1e-4 } as const;
const tiny = { hidden: 64, ffn: 192, heads: 4, kv_heads: 2, vocab: 256, seq: 64, layers: 2 };

const first = { lr: 3e-3, batch: 8, std: 0.05, steps: 50 };

/** All models by name: dense ones first, then mixtures of experts. */
export const modelPresets = {
  "tiny-llama": { label: "A dense model of 0.1 million parameters, for a first run on a CPU", model: tiny, ...first },
  "llama-3.2-1b": {
    ...{ label: "Llama 3.2 1B", lr: 4e-4, batch: 256, std: 0.02 },
    model: { ...llama, layers: 16, hidden: 2048, ffn: 8192, heads: 32, kv_heads: 8, tie_embeddings: true },
  },
  "llama-3.1-8b": {
    ...{ label: "Llama 3.1 8B", lr: 3e-4, batch: 512, std: 0.02 },
    model: { ...llama, layers: 32, hidden: 4096, ffn: 14336, heads: 32, kv_heads: 8 },
  },
  "llama-3.1-70b": {
    ...{ label: "Llama 3.1 70B", lr: 1.5e-4, batch: 1024, std: 0.02 },
    model: { ...llama, layers: 80, hidden: 8192, ffn: 28672, heads: 64, kv_heads: 8 },
  },
  "llama-3.1-405b": {
    ...{ label: "Llama 3.1 405B", lr: 8e-5, batch: 1024, std: 0.02 },
    model: { ...llama, layers: 126, hidden: 16384, ffn: 53248, heads: 128, kv_heads: 8 },
  },
  "mistral-7b": {
    ...{ label: "Mistral 7B", lr: 3e-4, batch: 1024, std: 0.02 },
    model: { ...mistral, layers: 32, hidden: 4096, ffn: 14336, heads: 32, vocab: 32000, rope: { theta: 1e4 } },
  },
  "qwen3-8b": {
    ...{ label: "Qwen3 8B", lr: 3e-4, batch: 1024, std: 0.02 },
    model: { ...qwen, layers: 36, hidden: 4096, ffn: 12288, heads: 32, kv_heads: 8 },
  },
  "qwen3-32b": {
    ...{ label: "Qwen3 32B", lr: 1.5e-4, batch: 1024, std: 0.02 },
    model: { ...qwen, layers: 64, hidden: 5120, ffn: 25600, heads: 64, kv_heads: 8 },
  },
  "tiny-mixtral": {
    ...{ label: "A model of 0.4 million parameters with 8 experts, for a first run on a CPU", ...first },
    model: { ...tiny, moe: { ...mixtralExperts, ffn: 96 } },
  },
  "mixtral-8x7b": {
    ...{ label: "Mixtral 8x7B", lr: 1e-4, batch: 1024, std: 0.02 },
    model: {
      ...{ ...mistral, layers: 32, hidden: 4096, ffn: 14336, heads: 32, vocab: 32000, rope: { theta: 1e6 } },
      moe: { ...mixtralExperts, ffn: 14336 },
    },
  },
  "mixtral-8x22b": {
    ...{ label: "Mixtral 8x22B", lr: 1e-4, batch: 1024, std: 0.02 },
    model: {
      ...{ ...mistral, layers: 56, hidden: 6144, ffn: 16384, heads: 48, vocab: 32768, rope: { theta: 1e6 } },
      moe: { ...mixtralExperts, ffn: 16384 },
    },
  },
  "olmoe-1b-7b": {
    ...{ label: "OLMoE 1B-7B", lr: 4e-4, batch: 1024, std: 0.02 },
    model: {
      ...{ layers: 16, hidden: 2048, ffn: 1024, heads: 16, kv_heads: 16, vocab: 50304, seq: 4096, qk_norm: "full" },
      ...{ norm: { eps: 1e-5 }, rope: { theta: 1e4 } },
      moe: { experts: 64, top_k: 8, ffn: 1024, router: { normalize_top_k: false, precision: "fp32", aux_coeff: 1e-2, z_coeff: 1e-3 } },
    },
  },
  "qwen3-30b-a3b": {
    ...{ label: "Qwen3 30B-A3B", lr: 3e-4, batch: 1024, std: 0.02 },
    model: { ...qwen, layers: 48, hidden: 2048, ffn: 6144, heads: 32, kv_heads: 4, moe: { ...qwenExperts, ffn: 768 } },
  },
  "qwen3-235b-a22b": {
    ...{ label: "Qwen3 235B-A22B", lr: 3e-4, batch: 2048, std: 0.02 },
    model: { ...qwen, layers: 94, hidden: 4096, ffn: 12288, heads: 64, kv_heads: 4, moe: { ...qwenExperts, ffn: 1536 } },
  },
  "moonlight-16b-a3b": {
    ...{ label: "Moonlight 16B-A3B", lr: 4.2e-4, batch: 1024, std: 0.02 },
    model: {
      ...{ ...deepseek, layers: 27, hidden: 2048, ffn: 11264, heads: 16, vocab: 163840, rope: { theta: 5e4, interleaved: true } },
      ...{ norm: { eps: 1e-5 }, mla: { q_rank: null, ...latent } },
      moe: { experts: 64, top_k: 6, ffn: 1408, layers: { first_dense: 1 }, shared: { ffn: 2816 }, router: { ...biased, scaling: 2.446 } },
    },
  },
  "deepseek-v2-lite": {
    ...{ label: "DeepSeek-V2-Lite 16B", lr: 4.2e-4, batch: 1024, std: 0.006 },
    model: {
      ...{ ...deepseek, layers: 27, hidden: 2048, ffn: 10944, heads: 16, vocab: 102400, mla: { q_rank: null, ...latent } },
      moe: {
        ...{ experts: 64, top_k: 6, ffn: 1408, layers: { first_dense: 1 }, shared: { ffn: 2816 } },
        router: { normalize_top_k: false, precision: "fp32", balance: "seq_aux_loss", aux_coeff: 1e-3 },
      },
    },
  },
  "deepseek-v3": {
    ...{ label: "DeepSeek-V3 671B", lr: 2.2e-4, batch: 8192, std: 0.006 },
    model: {
      ...{ ...deepseek, layers: 61, hidden: 7168, ffn: 18432, heads: 128, vocab: 129280, mla: { q_rank: 1536, ...latent } },
      mtp: { layers: 1, coeff: 0.3 },
      moe: {
        ...{ experts: 256, top_k: 8, ffn: 2048, layers: { first_dense: 3 }, shared: { ffn: 2048 } },
        router: { ...biased, scaling: 2.5, groups: 8, group_top_k: 4, group_scores: 2 },
      },
    },
  },
  "kimi-k2": {
    ...{ label: "Kimi K2 1T", lr: 2e-4, batch: 8192, std: 0.006 },
    model: {
      ...{ ...deepseek, layers: 61, hidden: 7168, ffn: 18432, heads: 64, vocab: 163840, rope: { theta: 5e4, interleaved: true } },
      mla: { q_rank: 1536, ...latent },
      moe: { experts: 384, top_k: 8, ffn: 2048, layers: { first_dense: 1 }, shared: { ffn: 2048 }, router: { ...biased, scaling: 2.827 } },
    },
  },
} as const satisfies Record<string, ModelPreset>;

/** The name of a model. */
export type ModelName = keyof typeof modelPresets;
/** The names of all models. */
export const modelNames = Object.keys(modelPresets) as ModelName[];
/** Returns the row of a model. */
export const presetOf = (name: ModelName): ModelPreset => modelPresets[name];
