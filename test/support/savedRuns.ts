import { join } from "node:path";
import { expect } from "vitest";
import type { StepResult } from "../../runtime/train/loop.ts";
import { openRun, type RunSettings } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";

const router = { score: "sigmoid", expert_bias: true, bias_rate: 0.05, balance: "seq_aux_loss", aux_coeff: 0.01 };
export const jobWith = (parallel: object, train: object = {}, model: object = {}): Job =>
  jobOf({
    name: "saved",
    model: {
      ...{ layers: 2, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, vocab: 256, seq: 16, dropout: { hidden: 0.1 } },
      ...{ moe: { experts: 4, top_k: 2, ffn: 16, router }, ...model },
    },
    parallel,
    train: {
      micro_batch: 1,
      global_batch: 16,
      steps: 6,
      precision: "fp32",
      init: { std: 0.2 },
      optimizer: { lr: 5e-3, eps: 1e-6, warmup_steps: 3 },
      ...train,
    },
    data: { path: "corpus.txt", order: "shuffled" },
  });

/** Plans of jobs that were compiled before. */
const plans = new Map<string, Plan>();
export function planOf(job: Job): Plan {
  const key = JSON.stringify(job);
  const plan = plans.get(key) ?? compile(job).plan;
  plans.set(key, plan);
  return plan;
}
/** Numbers of so many steps, the last of which is saved. */
export async function run(job: Job, steps: number, how: Partial<RunSettings> = {}, plan = planOf(job)): Promise<StepResult[]> {
  const opened = await openRun(plan, { baseDir: fixture(""), version: "test", ...how });
  const all: StepResult[] = [];
  for (let i = 0; i < steps; i++) all.push(await opened.step());
  if (how.save) expect(await opened.save()).toBe(join(how.save, `step-${String(all.at(-1)!.step).padStart(8, "0")}`));
  await opened.close();
  return all;
}
export const figures = (steps: readonly StepResult[]) => steps.map(({ seconds: _, data_wait_seconds: __, ...numbers }) => numbers);
