/** Training on WebGPU: plans of several meshes give the loss and the gradients of the CPU, the reference. */
import { describe, expect, test } from "vitest";
import type { Run } from "../runtime/execute.ts";
import { openRun, type RunSettings } from "../runtime/run.ts";
import type { Job } from "../schemas/job.ts";
import type { Plan } from "../schemas/plan.ts";
import { compile } from "../src/compile.ts";
import { loadTarget } from "../src/makers.ts";
import { noAdapter } from "./softwareAdapter.ts";
import { distance, fixture, jobOf } from "./support.ts";

/** One size for all that a product can have, so that many products are one kernel: compiling is what takes time here. */
const W = 32;
const model = { layers: 2, hidden: W, ffn: W, heads: 4, kv_heads: 4, head_dim: W / 4, vocab: 256, seq: 16 };
const moe = { experts: 4, top_k: 2, ffn: W, router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 } };
const jobWith = (parallel: object, more: object = {}): Job =>
  jobOf({
    name: "webgpu",
    model: { ...model, ...more },
    parallel,
    train: { micro_batch: 1, global_batch: 4, steps: 2, precision: "fp32", init_std: 0.2, optimizer: { lr: 1e-2 } },
    // where the text begins, sequences are one letter over and over: equals, among which rounding would choose
    data: { path: "corpus.txt", tokenizer: "bytes", order: "shuffled" },
  });

/** Two steps; the second sees the first one's update. */
async function numbers(plan: Plan, settings: Partial<RunSettings>) {
  const run: Run = await openRun(plan, { baseDir: fixture(""), ...settings });
  try {
    const first = await run.step();
    const gradients = await run.gradients();
    const second = await run.step();
    const metrics = [first, second].map(({ loss, aux_loss, grad_norm }) => ({ loss, aux_loss, grad_norm }));
    return { metrics, gradients, parameters: await run.parameters() };
  } finally {
    await run.close();
  }
}

describe.skipIf(noAdapter)(`on WebGPU${noAdapter ? `: skipped, ${noAdapter}` : ""}`, () => {
  // most of the time the software adapter compiles: few jobs that have much rather than several
  const router = {
    score: "sigmoid",
    expert_bias: true,
    bias_rate: 0.05,
    balance: ["seq_aux_loss", "global_aux_loss"],
    aux_coeff: [0.05, 0.05],
  };
  const jobs: Readonly<Record<string, Job>> = {
    "tensor, sequence, expert and pipeline parallel, moments apart": jobWith(
      { world: 4, tensor: 2, sequence: true, expert: 2, pipeline: 2, distributed_optimizer: true },
      { moe },
    ),
    "a router with a bias and running counts, a capacity, shared experts, one dense layer": jobWith(
      { world: 2, expert: 2 },
      { moe: { ...moe, router, capacity: { factor: 1 }, shared: { ffn: W, gate: true }, latent: W, layers: [0, 1] } },
    ),
    "latent keys that go around a ring, two chunks a stage": jobWith(
      { world: 4, context: 2, pipeline: 2, virtual_pipeline: 2 },
      { layers: 4, kv_heads: 4, head_dim: 6, mla: { kv_rank: 8, nope_dim: 4, rope_dim: 2, v_dim: 3 } },
    ),
    "choices that are even by themselves": jobWith(
      { world: 1 },
      { layers: 1, moe: { ...moe, router: { balance: "sinkhorn", normalize_top_k: false, z_coeff: 0.01 } } },
    ),
  };
  test.each(Object.entries(jobs))("%s: as on the CPU", { timeout: 600_000 }, async (_, job) => {
    const { plan, sources } = compile(job, { target: await loadTarget("webgpu:baseline") });
    const got = await numbers(plan, { backend: "webgpu", source: (file) => sources.get(file)! });
    const want = await numbers(compile(job).plan, {});
    for (const [step, metrics] of want.metrics.entries())
      for (const name of ["loss", "aux_loss", "grad_norm"] as const)
        expect(Math.abs(got.metrics[step]![name] - metrics[name]), `${name} of step ${step}`).toBeLessThan(
          1e-4 * Math.max(1, metrics[name]),
        );
    // far above the order of sums, far below any mistake
    for (const what of ["gradients", "parameters"] as const) {
      expect([...got[what].keys()]).toEqual([...want[what].keys()]);
      for (const [name, t] of want[what]) expect(distance(got[what].get(name)!.data, t.data), `${what} ${name}`).toBeLessThan(1e-4);
    }
  });
});
