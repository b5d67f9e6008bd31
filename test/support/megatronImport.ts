import { parse } from "yaml";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import type { ImportedJob } from "../../src/convert/importedJob.ts";
import { importMegatron, type MegatronSettings } from "../../src/convert/megatron/importMegatron.ts";
import { problemsOf } from "./importProblems.ts";

/** A model that rankc has, with experts; each test adds to it or leaves out of it. */
export const base = {
  "num-layers": "4",
  "hidden-size": "256",
  "num-attention-heads": "8",
  "seq-length": "128",
  "max-position-embeddings": "128",
  "position-embedding-type": "rope",
  normalization: "RMSNorm",
  swiglu: "",
  "untie-embeddings-and-output-weights": "",
  "disable-bias-linear": "",
  "num-experts": "8",
  "tokenizer-type": "NullTokenizer",
  "vocab-size": "1000",
  "micro-batch-size": "2",
  "train-iters": "100",
  lr: "1e-3",
  bf16: "",
};

export type Change = Readonly<Record<string, string | null>>;

export function wordsOf(change: Change): string[] {
  const all: Change = { ...base, ...change };
  return Object.entries(all).flatMap(([name, value]) => (value === null ? [] : [`--${name}`, ...value.split(" ").filter((w) => w !== "")]));
}

export const imported = (change: Change = {}, settings: Partial<MegatronSettings> = {}): ImportedJob =>
  importMegatron({ kind: "words" }, { name: "a", world: 8, words: wordsOf(change), ...settings });
export const complete = ({ text }: ImportedJob): Job => completeJob(JobText.parse(parse(text)));
export const jobOf = (change: Change = {}, settings: Partial<MegatronSettings> = {}): Job => complete(imported(change, settings));
export const expertsOf = (change: Change = {}) => {
  const { moe } = jobOf(change).model;
  if (moe === null) throw new Error("the job has no experts");
  return moe;
};

export const refusalOf = (change: Change): string => problemsOf(() => imported(change)).join("\n");

export const latent = { "multi-latent-attention": "", "qk-layernorm": "" };
