/** What backward makes again changes memory and flops, and no number; on any mesh. */
import { describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { compile } from "../../src/compile.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { fixture, jobOf, sameNumbers } from "../support/job.ts";
import { byTier, full, isFull } from "../support/tiers.ts";

const jobWith = (recompute: object, parallel: object = {}, moe: object | null = {}, more: object = {}) =>
  jobOf({
    name: "again",
    model: {
      ...{ layers: 4, hidden: 32, ffn: 48, heads: 8, kv_heads: 4, head_dim: 8, vocab: 256, seq: 16 },
      moe: moe && { experts: 8, top_k: 2, ffn: 16, router: { balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 }, ...moe },
      ...more,
    },
    parallel,
    train: { global_batch: 8, steps: 2, precision: "fp32", init: { std: 0.2 }, optimizer: { lr: 1e-2 }, recompute },
    data: { path: "corpus.txt" },
  });

async function train(job: ReturnType<typeof jobOf>) {
  const { plan } = compile(job);
  const run = await openRun(plan, { baseDir: fixture("") });
  const steps = [await run.step(), await run.step()].map(({ seconds: _, data_wait_seconds: __, ...numbers }) => numbers);
  const gradients = await run.gradients();
  await run.close();
  const again = instructionsOf(plan.programs[0]!).flatMap((i) => (i.id.includes(".again") && i.kind === "compute" ? [i.op] : []));
  return { steps, gradients, again, activations: plan.memory[0]!.activation[0]!, flops: inspectPlan(plan).roles[0]!.flops.per_step };
}

const meshes = {
  "one rank": {},
  "tensor 2 with sequence, expert 4": { world: 4, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true },
  "two stages of two chunks, expert 2": { world: 4, pipeline: 2, virtual_pipeline: 2, expert: 2 },
};
const recomputations = {
  "the attention core": { mode: "selective" },
  "norms and the activation of experts": { mode: "selective", modules: ["layernorm", "moe_act"] },
  "whole experts": { mode: "selective", modules: ["moe"] },
  "all of every layer": { mode: "full" },
  "all of every second layer's group": { mode: "full", layers: 2 },
  "one layer of a stage or chunk": { mode: "full", method: "block", layers: 1 },
};

describe.each(Object.entries(meshes).map(([name, parallel], n) => ({ name, parallel, n })))("$name", ({ parallel, n }) => {
  let whole: ReturnType<typeof train> | undefined;
  // each way on one of the meshes, on the fast tier
  for (const { options, rows } of byTier(Object.entries(recomputations), (_, i) => i % 3 === n))
    test.each(rows)("recomputation of %s: the same bits, less memory, more flops", options, async (_, recompute) => {
      const [kept, made] = [await (whole ??= train(jobWith({ mode: "none" }, parallel))), await train(jobWith(recompute, parallel))];
      expect(kept.again).toEqual([]);
      expect(made.again.length).toBeGreaterThan(0);
      expect(made.steps).toEqual(kept.steps);
      for (const [name, g] of kept.gradients) expect(sameNumbers(made.gradients.get(name)!.data, g.data), name).toBe(true);
      expect(made.activations).toBeLessThan(kept.activations);
      const costs = made.again.some((op) => /gemm|attention/.test(op));
      expect(made.flops > kept.flops).toBe(costs);
    });
});

test("of latent attention the latents are stored, and their projections are recomputed", full, async () => {
  const model = { kv_heads: 8, head_dim: 10, mla: { q_rank: 10, kv_rank: 12, nope_dim: 6, rope_dim: 4, v_dim: 5 } };
  const parallel = { world: 4, tensor: 2, sequence: true };
  const jobs = [{ mode: "none" }, { mode: "selective", modules: ["mla_up_proj"] }].map((how) => jobWith(how, parallel, null, model));
  const [kept, made] = [await train(jobs[0]!), await train(jobs[1]!)];
  expect(made.steps).toEqual(kept.steps);
  for (const [name, g] of kept.gradients) expect(sameNumbers(made.gradients.get(name)!.data, g.data), name).toBe(true);
  expect(new Set(made.again)).toEqual(new Set(["rmsnorm", "gemm", "rope", "latent_kv"]));
  const activations = compile(jobs[1]!).plan.programs[0]!.buffers.filter((b) => b.kind === "activation" && /layers\.1\.attn/.test(b.id));
  expect(activations.map((b) => b.id.replace("layers.1.attn.", ""))).toMatchInlineSnapshot(`
    [
      "norm",
      "wq_a",
      "kv_split.a",
      "kv_split.b",
      "core.o",
      "core.lse",
      "residual",
    ]
  `);
});

test("full recomputation stores only the inputs of layers", () => {
  const { plan } = compile(jobWith({ mode: "full" }, {}, null));
  const kept = plan.programs[0]!.buffers.filter((b) => b.kind === "activation").map((b) => b.id);
  // the tokens, what enters each layer, and what the head and the loss take
  expect(kept.filter((id) => id.startsWith("layers."))).toEqual([0, 1, 2, 3].map((i) => `layers.${i}.mlp.residual`));
});

test("a dense model's feed-forward part, by name", async () => {
  const { again } = await train(jobWith({ mode: "selective", modules: ["mlp"] }, {}, null));
  expect(again).toEqual(Array.from({ length: 4 }, () => ["gemm", "gemm", "swiglu"]).flat());
});

// as in Megatron Core: `uniform` makes each of these layers again, `block` none
test(
  "of multi-token prediction the inputs and outputs of depths are stored; named modules and whole layers are recomputed",
  full,
  async () => {
    const model = { mtp: { layers: 2, coeff: 0.3 } };
    for (const parallel of [...(isFull ? [{}] : []), meshes["two stages of two chunks, expert 2"]]) {
      const kept = await train(jobWith({ mode: "none" }, parallel, {}, model));
      const again = async (recompute: object) => {
        const job = jobWith(recompute, parallel, {}, model);
        const made = await train(job);
        expect(made.steps).toEqual(kept.steps);
        for (const [name, g] of kept.gradients) expect(sameNumbers(made.gradients.get(name)!.data, g.data), name).toBe(true);
        const last = compile(job).plan.programs.at(-1)!;
        return instructionsOf(last).flatMap((i) =>
          /^mtp\.1\..*\.again$/.test(i.id) ? [i.id.slice("mtp.1.".length, -".again".length)] : [],
        );
      };
      expect(await again({ mode: "full", method: "block" })).toEqual([]);
      if (isFull) expect(await again({ mode: "selective", modules: ["core_attn"] })).toEqual(["attn.core"]);
      const all = await again({ mode: "full" });
      expect(all).toEqual(expect.arrayContaining(["embedding.norm", "hidden.norm", "projected", "attn.core", "moe.w1", "mlp.residual"]));
      expect(all.filter((id) => /^(embedding|final\.norm|logits|loss.*)$/.test(id))).toEqual([]);
    }
  },
);
