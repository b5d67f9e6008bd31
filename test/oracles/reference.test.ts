/** The numbers are those of Hugging Face transformers (fixtures/hf), whatever the parallelism. */
import { describe, expect, test } from "vitest";
import { toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { openSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { byPosition, distance, fixture } from "../support/job.ts";
import { expectedOf, referenceJob, references } from "../support/referenceJobs.ts";
import { byTier, isFull } from "../support/tiers.ts";

/** Meshes for a model: with so many layers, and with experts or without. */
function meshesOf({ model: { layers, moe } }: Job): readonly (readonly [string, number, object])[] {
  const pipeline = layers % 2 === 0 ? 2 : layers;
  const optimizer = { distributed_optimizer: true };
  const always = [
    {},
    { world: 2, tensor: 2, sequence: true },
    { world: pipeline, pipeline },
    { world: 2, ...optimizer },
    ...(moe
      ? []
      : [
          { world: 8, tensor: 2, context: 4, ...optimizer },
          { world: 8 * pipeline, tensor: 2, pipeline, context: 2, ...optimizer },
        ]),
  ];
  const sparse = [
    { world: 4, expert: 4 },
    { world: 2, tensor: 2, sequence: true, expert_tensor: 2 },
    { world: 8 * pipeline, tensor: 2, sequence: true, pipeline, expert: 2, ...optimizer },
    { world: 8 * pipeline, tensor: 2, sequence: true, pipeline, expert: 2, expert_tensor: 2, context: 2, ...optimizer },
  ];
  const all: readonly object[] = [...always, ...(moe ? sparse : [])];
  // the first steps show whether a mesh is right: the second has the first update, the third the momentum of two; in the full tier one
  // rank and the largest mesh run all steps
  const stepsOf = (i: number) => (!isFull ? 3 : i === 0 || i === all.length - 1 ? 20 : 5);
  return all.map((parallel, i) => [JSON.stringify(parallel), stepsOf(i), parallel]);
}

describe.each(references)("%s", (name) => {
  const expected = expectedOf(name);

  // in the fast tier every second model on one mesh, another one for each model; the first of them on one rank
  const meshes = meshesOf(referenceJob(name));
  const one = references.indexOf(name) % meshes.length;
  for (const { options, rows } of byTier(meshes, (_, i) => i === one && references.indexOf(name) % 2 === 0))
    test.each(rows)("%s: logits, gradients and %d losses", options, async (_, steps, parallel) => {
      const { plan } = compile(referenceJob(name, parallel));
      const run = await openRun(plan, { baseDir: fixture(""), initFrom: fixture(`hf/${name}/model.safetensors`), watch: ["logits"] });
      const losses: number[] = [];
      const norms: number[] = [];
      for (let step = 0; step < steps; step++) {
        const { loss, grad_norm } = await run.step();
        losses.push(loss);
        norms.push(grad_norm);
        if (step > 0) continue;
        const io = openSafetensors(fixture(`hf/${name}/io.safetensors`));
        const logits = (await run.watched("logits")).flatMap((t) => [...byPosition(t, plan.job)]);
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
    });
});
