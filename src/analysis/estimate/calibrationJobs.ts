/**
 * The jobs that `rankc calibrate` measures where it is given none: one or two layers each, which together have the classes of kernels that models
 * run, so that a kernel of a model lies between measured ones. Attention: heads of 64, 128, 192 with values of 128, and 256; 1,024 to 32,768 tokens; 1 to 8
 * query heads for a key head. Products: depths of 768 to 28,672. Experts: 256 to 3,277 rows each. The first jobs cover the most: a limit of time ends the list anywhere.
 */
import type { Device } from "../../../schemas/devices.ts";

/** A job with what distinguishes it from the others. */
interface CalibrationShape {
  readonly name: string;
  /** Sequences of a microbatch. */
  readonly micro: number;
  /** Microbatches of a step: with two, weight gradients are also added to. */
  readonly microbatches?: 1 | 2;
  readonly optimizer?: "sgd" | "adamw";
  readonly model: Readonly<Record<string, unknown>>;
}

const mla = { kv_rank: 512, nope_dim: 128, rope_dim: 64, v_dim: 128 };
const gpt = { activation: "gelu", norm: { type: "layernorm" } };
const gemma = { activation: "geglu", head_dim: 256, tie_embeddings: true };
const balanced = { router: { balance: "none" } };
const sigmoid = { router: { score: "sigmoid", balance: "none" } };

const shapes: readonly CalibrationShape[] = [
  {
    ...{ name: "heads-128-4k-two-microbatches", micro: 2, microbatches: 2 },
    model: { layers: 2, hidden: 2560, ffn: 9728, heads: 32, kv_heads: 8, head_dim: 128, seq: 4096, qk_norm: "head" },
  },
  {
    ...{ name: "experts-64-of-1024", micro: 4 },
    model: {
      layers: 2,
      hidden: 2048,
      ffn: 1024,
      heads: 16,
      seq: 4096,
      qk_norm: "full",
      moe: { experts: 64, top_k: 8, ffn: 1024, ...balanced },
    },
  },
  {
    ...{ name: "heads-256-4k", micro: 1 },
    model: { layers: 2, hidden: 3072, ffn: 24576, heads: 16, seq: 4096, ...gemma },
  },
  {
    ...{ name: "heads-64-1k-adamw", micro: 16, microbatches: 2, optimizer: "adamw" },
    model: { layers: 2, hidden: 768, ffn: 3072, heads: 12, seq: 1024, tie_embeddings: true, ...gpt },
  },
  {
    ...{ name: "latent-16-heads-4k", micro: 2 },
    model: {
      ...{ layers: 2, hidden: 2048, ffn: 10944, heads: 16, seq: 4096, mla },
      moe: { experts: 64, top_k: 6, ffn: 1408, layers: { first_dense: 1 }, shared: { ffn: 2816 }, ...balanced },
    },
  },
  {
    ...{ name: "experts-8-of-14336", micro: 1, microbatches: 2 },
    model: {
      layers: 1,
      hidden: 4096,
      ffn: 14336,
      heads: 32,
      kv_heads: 8,
      seq: 4096,
      moe: { experts: 8, top_k: 2, ffn: 14336, ...balanced },
    },
  },
  {
    ...{ name: "heads-64-8k", micro: 1 },
    model: { layers: 2, hidden: 2048, ffn: 8192, heads: 32, kv_heads: 8, vocab: 128256, seq: 8192, tie_embeddings: true },
  },
  {
    ...{ name: "heads-128-16k", micro: 1 },
    model: { layers: 1, hidden: 4096, ffn: 14336, heads: 32, kv_heads: 8, seq: 16384 },
  },
  {
    ...{ name: "experts-128-of-1536", micro: 2 },
    model: {
      ...{ layers: 1, hidden: 4096, ffn: 1536, heads: 64, kv_heads: 4, head_dim: 128, seq: 4096, qk_norm: "head" },
      moe: { experts: 128, top_k: 8, ffn: 1536, ...balanced },
    },
  },
  {
    ...{ name: "latent-128-heads-2k", micro: 2 },
    model: {
      ...{ layers: 1, hidden: 5120, ffn: 12288, heads: 128, seq: 2048, mla: { q_rank: 1536, ...mla } },
      moe: { experts: 40, top_k: 6, ffn: 1536, shared: { ffn: 3072 }, ...balanced },
    },
  },
  {
    ...{ name: "heads-128-1k", micro: 8 },
    model: { layers: 2, hidden: 4096, ffn: 11008, heads: 32, seq: 1024 },
  },
  {
    ...{ name: "heads-256-1k", micro: 8 },
    model: { layers: 2, hidden: 2048, ffn: 16384, heads: 8, kv_heads: 1, seq: 1024, ...gemma },
  },
  {
    ...{ name: "experts-256-of-512", micro: 2 },
    model: {
      ...{ layers: 2, hidden: 2048, ffn: 512, heads: 16, kv_heads: 2, head_dim: 128, seq: 4096 },
      moe: { experts: 256, top_k: 8, ffn: 512, shared: { ffn: 512 }, ...sigmoid },
    },
  },
  {
    ...{ name: "heads-64-2k", micro: 4 },
    model: { layers: 2, hidden: 1536, ffn: 6144, heads: 24, seq: 2048, tie_embeddings: true, ...gpt },
  },
  {
    ...{ name: "heads-256-16k", micro: 1 },
    model: { layers: 1, hidden: 2048, ffn: 5120, heads: 16, kv_heads: 2, head_dim: 256, seq: 16384, qk_norm: "head" },
  },
  {
    ...{ name: "experts-60-of-1408", micro: 4 },
    model: {
      layers: 2,
      hidden: 2048,
      ffn: 5632,
      heads: 16,
      seq: 1024,
      moe: { experts: 60, top_k: 4, ffn: 1408, shared: { ffn: 5632, gate: true }, ...balanced },
    },
  },
  {
    ...{ name: "heads-128-8k-wide", micro: 1 },
    model: { layers: 1, hidden: 8192, ffn: 28672, heads: 64, kv_heads: 8, seq: 8192 },
  },
  {
    ...{ name: "latent-64-heads-8k", micro: 1 },
    model: {
      ...{ layers: 1, hidden: 7168, ffn: 18432, heads: 64, seq: 8192, mla: { q_rank: 1536, ...mla } },
      moe: { experts: 16, top_k: 4, ffn: 2048, shared: { ffn: 2048 }, ...sigmoid },
    },
  },
  {
    ...{ name: "experts-40-of-512", micro: 4 },
    model: {
      layers: 2,
      hidden: 1536,
      ffn: 512,
      heads: 24,
      kv_heads: 8,
      seq: 4096,
      tie_embeddings: true,
      moe: { experts: 40, top_k: 8, ffn: 512, ...balanced },
    },
  },
  {
    ...{ name: "heads-128-32k", micro: 1 },
    model: { layers: 1, hidden: 2048, ffn: 6144, heads: 16, kv_heads: 2, head_dim: 128, seq: 32768 },
  },
  {
    ...{ name: "experts-128-of-768", micro: 2 },
    model: {
      ...{ layers: 2, hidden: 2048, ffn: 768, heads: 32, kv_heads: 4, head_dim: 128, seq: 2048, qk_norm: "head" },
      moe: { experts: 128, top_k: 8, ffn: 768, ...balanced },
    },
  },
  {
    ...{ name: "heads-128-2k-two-microbatches", micro: 4, microbatches: 2 },
    model: { layers: 1, hidden: 5120, ffn: 13824, heads: 40, seq: 2048 },
  },
  {
    ...{ name: "experts-16-of-6400", micro: 2 },
    model: {
      layers: 1,
      hidden: 4096,
      ffn: 6400,
      heads: 32,
      kv_heads: 8,
      seq: 4096,
      moe: { experts: 16, top_k: 2, ffn: 6400, ...balanced },
    },
  },
  {
    ...{ name: "heads-64-32k", micro: 1 },
    model: { layers: 1, hidden: 1024, ffn: 2816, heads: 16, kv_heads: 4, seq: 32768 },
  },
  {
    ...{ name: "heads-256-8k-adamw", micro: 1, optimizer: "adamw" },
    model: { layers: 2, hidden: 2304, ffn: 9216, heads: 8, kv_heads: 4, seq: 8192, ...gemma },
  },
];

/** Returns the calibration jobs for a device, as the values of job files. */
export const calibrationJobs = (device: Device): readonly { readonly name: string }[] =>
  shapes.map(({ name, micro, microbatches = 1, optimizer = "sgd", model }) => ({
    name,
    model: { vocab: 32768, ...model },
    parallel: { world: 1 },
    train: {
      ...{ micro_batch: micro, global_batch: micro * microbatches, steps: 1, precision: "bf16" },
      optimizer: optimizer === "sgd" ? { type: optimizer, lr: 1e-6, momentum: 0 } : { type: optimizer, lr: 1e-6 },
    },
    data: { path: "none.txt" },
    cluster: { device },
  }));
