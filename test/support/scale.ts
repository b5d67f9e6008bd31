/** The same training on more ranks, or with more layers: what the bench times and a test weighs. */
import { readFileSync } from "node:fs";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { root } from "./checkout.ts";

/** An example with some keys changed. */
export function jobAt(example: string, sets: Readonly<Record<string, unknown>>): Job {
  const path = `plans/${example}/job.yaml`;
  const text = readFileSync(root + path, "utf8");
  const { job, findings } = readJob(
    text,
    path,
    Object.entries(sets).map(([key, value]) => `${key}=${value}`),
  );
  if (!job) throw new Error(findings.map((f) => `${f.code} ${f.path}: ${f.found}`).join("\n"));
  return job;
}

/**
 * Mixtral 8x7B with whole experts, which are replicated at any number of ranks, so that its collectives are the same.
 * The batch grows with the ranks: a step keeps its 32 microbatches.
 */
export function scaledJob({ ranks = 16, layers = 32 }: { ranks?: number; layers?: number }): Job {
  return jobAt("mixtral-8x7b-16gpu", {
    ...{ "parallel.world": ranks, "cluster.nodes": ranks / 8, "train.global_batch": 8 * ranks, "model.layers": layers },
    "parallel.expert_tensor": 1,
  });
}

/** DeepSeek-V3 on 16 stages of two chunks; a step keeps its 128 microbatches. */
export const deepseekSets = (ranks: number): Readonly<Record<string, unknown>> => ({
  ...{ "parallel.world": ranks, "parallel.pipeline": 16, "parallel.virtual_pipeline": 2, "train.global_batch": 4 * ranks },
});

export const planBytes = (job: Job): number => Buffer.byteLength(printPlan(compile(job).plan));
