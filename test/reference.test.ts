/** The numbers are those of Hugging Face transformers (fixtures/hf), whatever the parallelism. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { toHuggingFace } from "../runtime/checkpoint.ts";
import { openRun } from "../runtime/execute.ts";
import { openSafetensors } from "../runtime/safetensors.ts";
import { compile } from "../src/compile.ts";
import { distance, fixture, jobOf } from "./support.ts";

const meshes = {
  "one rank": {},
  "tensor 2, sequence": { world: 2, tensor: 2, sequence: true },
  "expert 4": { world: 4, expert: 4 },
  "pipeline 2": { world: 2, pipeline: 2 },
  "data 2, distributed optimizer": { world: 2, distributed_optimizer: true },
  "expert_tensor 2": { world: 2, tensor: 2, sequence: true, expert_tensor: 2 },
  "16 ranks: tensor 2, pipeline 2, expert 2, data 4": {
    world: 16,
    tensor: 2,
    sequence: true,
    pipeline: 2,
    expert: 2,
    distributed_optimizer: true,
  },
  "16 ranks: tensor 2, pipeline 2, expert 2, expert_tensor 2, context 2, data 2": {
    world: 16,
    tensor: 2,
    sequence: true,
    pipeline: 2,
    expert: 2,
    expert_tensor: 2,
    context: 2,
    distributed_optimizer: true,
  },
};
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

describe.each(Object.keys(models) as (keyof typeof models)[])("%s", (name) => {
  const expected = JSON.parse(readFileSync(fixture(`hf/${name}/expected.json`), "utf8")) as { losses: number[]; grad_norms: number[] };
  const jobOn = (parallel: object) =>
    jobOf({
      name,
      model: {
        layers: 2,
        hidden: 64,
        ffn: 96,
        heads: 4,
        head_dim: 16,
        vocab: 256,
        seq: 64,
        norm: { type: "rmsnorm", eps: 1e-5 },
        ...models[name],
      },
      parallel,
      train: {
        micro_batch: 1,
        global_batch: 4,
        steps: 20,
        precision: "fp32",
        optimizer: { lr: 1e-3, schedule: "constant", betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1 },
      },
      data: { path: "corpus.txt", tokenizer: "bytes" },
    });

  test.each(Object.entries(meshes))(
    "%s: logits, gradients and 20 losses",
    async (_, parallel) => {
      const { plan } = compile(jobOn(parallel));
      const run = await openRun(plan, { baseDir: fixture(""), initFrom: fixture(`hf/${name}/model.safetensors`), watch: ["logits"] });
      const losses: number[] = [];
      const norms: number[] = [];
      for (let step = 0; step < 20; step++) {
        const { loss, grad_norm } = await run.step();
        losses.push(loss);
        norms.push(grad_norm);
        if (step > 0) continue;
        const io = openSafetensors(fixture(`hf/${name}/io.safetensors`));
        const logits = (await run.watched("logits")).flatMap(({ data }) => [...data]);
        expect(distance(logits, io.read("logits")), "logits").toBeLessThan(1e-4);
        const grads = openSafetensors(fixture(`hf/${name}/grads.safetensors`));
        const ours = toHuggingFace(plan.job.model, await run.gradients());
        expect(ours.map((g) => g.name).sort()).toEqual([...grads.names].sort());
        for (const g of ours) expect(distance(g.data, grads.read(g.name)), g.name).toBeLessThan(1e-4);
        io.close();
        grads.close();
      }
      for (const [i, loss] of losses.entries()) expect(Math.abs(loss - expected.losses[i]!), `loss of step ${i}`).toBeLessThan(2e-4);
      for (const [i, norm] of norms.entries()) expect(Math.abs(norm / expected.grad_norms[i]! - 1), `norm of step ${i}`).toBeLessThan(2e-3);
      await run.close();
    },
    60_000,
  );
});
