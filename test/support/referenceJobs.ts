/** The checkpoints of fixtures/hf as jobs, and the numbers that Hugging Face transformers found when it trained them. */
import { readdirSync, readFileSync } from "node:fs";
import type { Job } from "../../schemas/job.ts";
import { importHf } from "../../src/convert/hf/importHf.ts";
import { fixture, jobOf } from "./job.ts";

/** Every folder there is. */
export const references: readonly string[] = readdirSync(fixture("hf"), { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name)
  .sort();

const read = (path: string) => JSON.parse(readFileSync(fixture(`hf/${path}`), "utf8"));

export const expectedOf = (name: string): { readonly losses: readonly number[]; readonly grad_norms: readonly number[] } =>
  read(`${name}/expected.json`);

/** The job that was trained there, on any mesh: the model is what `rankc import hf` makes of its config. */
export function referenceJob(name: string, parallel: object = {}, precision: "fp32" | "bf16" = "fp32"): Job {
  const { model } = importHf(read(`${name}/config.json`), name).job;
  const { moe } = model;
  // transformers chooses by the experts' bias, and leaves it as it is
  const still = moe?.router?.expert_bias ? { moe: { ...moe, router: { ...moe.router, bias_rate: 0 } } } : {};
  return jobOf({
    name,
    model: { ...model, seq: 64, ...still },
    parallel,
    train: {
      ...{ micro_batch: 1, global_batch: 4, steps: 20, precision },
      optimizer: { lr: 1e-3, schedule: "constant", betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1 },
    },
    data: { path: "corpus.txt", tokenizer: "bytes" },
  });
}
