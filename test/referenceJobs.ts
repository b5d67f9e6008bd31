/** The checkpoints of fixtures/hf as jobs, and the numbers that Hugging Face transformers found when it trained them. */
import { readFileSync } from "node:fs";
import type { Job } from "../schemas/job.ts";
import { fixture, jobOf } from "./support.ts";

const models = {
  "mixtral-tiny": {
    kv_heads: 2,
    qk_norm: "none",
    rope: { theta: 1e6 },
    moe: { experts: 8, top_k: 2, ffn: 96, router: { normalize_top_k: true, balance: "none" } },
  },
  "olmoe-tiny": {
    kv_heads: 4,
    qk_norm: "full",
    rope: { theta: 1e4 },
    moe: { experts: 16, top_k: 4, ffn: 48, router: { normalize_top_k: false, balance: "none" } },
  },
};
export type Reference = keyof typeof models;
export const references = Object.keys(models) as readonly Reference[];

export const expectedOf = (name: Reference): { readonly losses: readonly number[]; readonly grad_norms: readonly number[] } =>
  JSON.parse(readFileSync(fixture(`hf/${name}/expected.json`), "utf8"));

/** The job that was trained there, on any mesh. */
export const referenceJob = (name: Reference, parallel: object = {}, precision: "fp32" | "bf16" = "fp32"): Job =>
  jobOf({
    name,
    model: {
      ...{ layers: 2, hidden: 64, ffn: 96, heads: 4, head_dim: 16, vocab: 256, seq: 64, norm: { type: "rmsnorm", eps: 1e-5 } },
      ...models[name],
    },
    parallel,
    train: {
      ...{ micro_batch: 1, global_batch: 4, steps: 20, precision },
      optimizer: { lr: 1e-3, schedule: "constant", betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1 },
    },
    data: { path: "corpus.txt", tokenizer: "bytes" },
  });
