/** The numbers are those of Hugging Face transformers (fixtures/hf), whatever the parallelism. */
import { describe, expect, test } from "vitest";
import { toHuggingFace } from "../runtime/checkpoint.ts";
import { openRun } from "../runtime/run.ts";
import { openSafetensors } from "../runtime/safetensors.ts";
import { compile } from "../src/compile.ts";
import { expectedOf, referenceJob, references } from "./referenceJobs.ts";
import { distance, fixture } from "./support.ts";

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
describe.each(references)("%s", (name) => {
  const expected = expectedOf(name);

  test.each(Object.entries(meshes))(
    "%s: logits, gradients and 20 losses",
    async (_, parallel) => {
      const { plan } = compile(referenceJob(name, parallel));
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
