/** The central law: a job's loss and gradients do not depend on its mesh, nor on the choices `shard` makes. */
import fc from "fast-check";
import { afterAll, expect, test } from "vitest";
import { stringify } from "yaml";
import type { Choice } from "../../src/passes/sharding/dimChoice.ts";
import { anyJob } from "../support/anyJob.ts";
import { fixture, jobOf, sameNumbers } from "../support/job.ts";
import { labelsBeside } from "../support/labels.ts";
import {
  enough,
  moe,
  moeOfThirds,
  type Numbers,
  numbers,
  type Parallel,
  reference,
  references,
  same,
  sameSoFar,
  shape,
  text,
  thirds,
} from "../support/meshLaw.ts";
import { draws, isFull } from "../support/tiers.ts";

afterAll(() => references.clear());
const some = labelsBeside(fixture("corpus.txt"));
afterAll(some.remove);

test("a loss on the counts of all data ranks, on as many microbatches", async () => {
  const model = shape({ moe: { ...moe, router: { balance: "global_aux_loss", aux_coeff: 0.05 } } });
  const meshes: Parallel[] = [
    { world: 4, expert: 4 },
    { world: 16, tensor: 2, sequence: true, context: 2, expert: 4, distributed_optimizer: true },
    { world: 16, pipeline: 2, tensor: 2, sequence: true, expert: 2, expert_tensor: 2 },
  ];
  const alone = await reference(text(model, { world: 1 }, { micro_batch: 4 }));
  expect(alone.steps[0]!.aux_loss).toBeGreaterThan(0.1);
  for (const mesh of meshes.slice(isFull ? 0 : 1, isFull ? 3 : 2)) same(await numbers(jobOf(text(model, mesh))), alone);
});

test("the same plan on the same inputs gives the same bits", async () => {
  const job = jobOf(text(shape({ moe }), { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 4, distributed_optimizer: true }));
  const [first, again] = [await numbers(job), await numbers(job)];
  const figures = ({ steps }: Numbers) => steps.map(({ loss, aux_loss, grad_norm }) => [loss, aux_loss, grad_norm]);
  expect(figures(again)).toEqual(figures(first));
  expect(again.choices).toEqual(first.choices);
  for (const [name, t] of first.gradients) expect(sameNumbers(again.gradients.get(name)!.data, t.data), name).toBe(true);
});

test("bf16 on any of these meshes follows fp32", async () => {
  const alone = await reference(text(shape({ moe }), { world: 1 }));
  for (const parallel of [{ world: 1 }, { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 4, distributed_optimizer: true }]) {
    const got = await numbers(jobOf(text(shape({ moe }), parallel, { precision: "bf16" })));
    // bf16 keeps 8 bits: 2^-9 relative per rounding; a few dozen roundings on the way to the loss
    for (const [i, { loss, aux_loss }] of alone.steps.entries()) {
      expect(Math.abs(got.steps[i]!.loss - loss), `loss of step ${i}`).toBeLessThan(2e-2);
      expect(Math.abs(got.steps[i]!.aux_loss - aux_loss), `balancing loss of step ${i}`).toBeLessThan(2e-2);
    }
    expect(got.steps[0]!.loss).not.toBe(alone.steps[0]!.loss);
  }
});

test("on any legal mesh of up to 16 ranks, any small model, documents, labels, dropout and jitter, optimizer, growth of the batch, schedule, router, capacity and recompute", async () => {
  const steps: number[] = [];
  const { failed, counterexample, errorInstance, seed, counterexamplePath } = await fc.check(
    fc.asyncProperty(anyJob(some.path), async ({ job, alone }) => {
      const meshed = jobOf(job);
      const { gradient_reduction } = meshed.train;
      const compared = sameSoFar(await numbers(meshed), await reference(alone), gradient_reduction);
      steps.push(gradient_reduction === "bf16" ? 2 * compared : compared);
    }),
    { numRuns: draws(1, 200) },
  );
  if (failed)
    expect.fail(`${(errorInstance as Error).message}
Its numbers are not those of ${JSON.stringify(counterexample![0].alone.parallel)}; drawn by seed ${seed}, path ${counterexamplePath}.
The smallest job that fails:

${stringify(counterexample![0].job)}`);
  enough(steps);
});

test("any choice of dims gives the same numbers: the rules decide cost only", async () => {
  const router = {
    score: "sigmoid",
    expert_bias: true,
    bias_rate: 0.05,
    balance: ["seq_aux_loss", "global_aux_loss"],
    aux_coeff: [0.05, 0.05],
  };
  const experts = {
    plain: {},
    rich: {
      router: { ...router, bias: true },
      bias: true,
      capacity: { factor: 1, pad: true },
      shared: { ffn: 24, gate: true },
      latent: 16,
    },
    once: { dispatch: "once", top_k: 3 },
    perNode: { dispatch: "once_per_node", top_k: 3 },
    even: { router: { balance: "sinkhorn", normalize_top_k: false } },
    chosen: { router: { type: "expert_choice", normalize_top_k: false } },
  };
  const jobFor = (parallel: Parallel, over: object): object =>
    parallel.world! % 3 === 0
      ? text(shape({ ...thirds, moe: { ...moeOfThirds, ...over } }), parallel, { global_batch: 12 })
      : text(shape({ moe: { ...moe, ...over } }), parallel);
  const steps: number[] = [];
  const meshes: Parallel[] = [
    { world: 4, tensor: 2, sequence: true, expert: 2 },
    { world: 8, tensor: 2, sequence: true, context: 2, expert: 4 },
    { world: 8, tensor: 2, sequence: true, expert: 2, expert_tensor: 2, distributed_optimizer: true },
    { world: 8, pipeline: 2, expert: 4 },
    { world: 6, tensor: 2, sequence: true, expert: 3, distributed_optimizer: true },
    { world: 12, tensor: 2, sequence: true, context: 2, expert: 3, expert_tensor: 2 },
  ];
  await fc.assert(
    fc.asyncProperty(fc.integer(), fc.constantFrom(...meshes), fc.constantFrom(...Object.values(experts)), async (seed, parallel, over) => {
      let s = seed;
      const pick = (votes: readonly Choice[]): Choice => {
        s = Math.imul(s, 1664525) + 1013904223;
        return votes[(s >>> 8) % (votes.length + 1)] ?? { by: () => "nothing" };
      };
      const job = { ...jobFor(parallel, over), cluster: { gpus_per_node: parallel.world! % 3 === 0 ? 6 : 2 } };
      steps.push(sameSoFar(await numbers(jobOf(job), pick), await reference(job)));
    }),
    {
      numRuns: draws(1, 20),
      // E cut by the same factors in another order: once two layouts under one name
      examples: [
        [77, meshes[1]!, experts.plain],
        ...(isFull ? [[1538828707, meshes[1]!, experts.plain] as [number, Parallel, object]] : []),
      ],
    },
  );
  enough(steps);
});
