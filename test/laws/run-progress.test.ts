/**
 * The progress of a run does not depend on the mesh: batches that grow, and the scale of losses in fp16, which adapts. A step of a
 * smaller batch has the losses and gradients of a job with batches of that size.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { openCpu } from "../../runtime/cpu/backend.ts";
import { runOn, type StepResult, type Tensor } from "../../runtime/train/loop.ts";
import { lossScaleOf } from "../../runtime/train/lossScale.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { orderOf } from "../../schemas/program.ts";
import { compile } from "../../src/compile.ts";
import { schedule, timesOf } from "../../src/passes/schedule.ts";
import { distance, fixture, jobOf, sameNumbers } from "../support/job.ts";
import { random } from "../support/opCases.ts";
import { draws, full, isFull } from "../support/tiers.ts";

const router = {
  balance: ["aux_loss", "seq_aux_loss", "global_aux_loss"],
  aux_coeff: [0.05, 0.02, 0.03],
  z_coeff: 0.01,
  expert_bias: true,
  score: "sigmoid",
};
const moe = { experts: 8, top_k: 2, ffn: 16, router };
const shape = { layers: 4, hidden: 32, ffn: 48, heads: 8, kv_heads: 4, head_dim: 8, vocab: 256, seq: 16 };
const jobWith = (model: object, parallel: object, train: object): Job =>
  jobOf({
    name: "course",
    model: { ...shape, ...model },
    parallel,
    // by SGD a rounding stays as small as it was; Adam makes a whole step of the smallest gradient
    train: { micro_batch: 1, steps: 8, precision: "fp32", init: { std: 0.2 }, optimizer: { type: "sgd", lr: 0.05 }, ...train },
    data: { path: "corpus.txt", order: "shuffled" },
  });

async function stepsOf(job: Job, count: number): Promise<{ steps: StepResult[]; learnt: Map<string, Tensor> }> {
  const run = await openRun(compile(job).plan, { baseDir: fixture("") });
  const steps: StepResult[] = [];
  for (let i = 0; i < count; i++) steps.push(await run.step());
  const learnt = await run.parameters();
  await run.close();
  return { steps, learnt };
}

describe("a batch that grows", () => {
  const ramp = { global_batch: 16, batch_rampup: { start: 4, increment: 4, samples: 30 } };
  const sizes = [4, 4, 4, 8, 12, 16, 16];

  test("a step of a smaller batch has the losses and gradients of a job with batches of that size", async () => {
    const train = { optimizer: { type: "sgd", lr: 1e-12, momentum: 0 } };
    const next = random(7);
    const tokens = Int32Array.from({ length: 100 * 17 }, () => Math.floor((next() + 1) * 127.9));
    const batch = (first: number, n: number) => {
      const rows = (from: number) =>
        Int32Array.from({ length: n * 16 }, (_, i) => tokens[(first + Math.floor(i / 16)) * 17 + (i % 16) + from]!);
      return { ids: rows(0), labels: rows(1) };
    };
    const open = (job: Job, from = 0) => {
      const { plan } = compile(job);
      return runOn(plan, { localRanks: openCpu(plan), batch: (first, n) => batch(from + first, n) });
    };
    // a bias of the choice would move, and choices with it
    const model = { layers: isFull ? 2 : 1, moe: { ...moe, router: { ...router, expert_bias: false } } };
    const growing = open(jobWith(model, {}, { ...ramp, ...train }));
    let read = 0;
    for (const size of sizes) {
      const [got, gradients] = [await growing.step(), await growing.gradients()];
      expect(got.tokens).toBe(16 * size);
      const plain = open(jobWith(model, {}, { global_batch: size, ...train }), read);
      const [want, theirs] = [await plain.step(), await plain.gradients()];
      for (const name of ["loss", "aux_loss", "grad_norm"] as const)
        expect(Math.abs(got[name] / want[name] - 1), `${name} of ${size}`).toBeLessThan(1e-6);
      for (const [name, t] of theirs) expect(distance(gradients.get(name)!.data, t.data), `${name} of ${size}`).toBeLessThan(1e-5);
      read += size;
    }
  });

  const meshes = [
    { world: 2, pipeline: 2, virtual_pipeline: 2 },
    { world: 4, pipeline: 4, schedule: "zero_bubble" },
    { world: 8, pipeline: 2, tensor: 2, sequence: true, expert: 2, distributed_optimizer: true },
    { world: 4, expert: 4, distributed_optimizer: true },
  ];
  // the mean over the microbatches so far depends on how many there are, and so on the mesh
  const alike = { moe: { ...moe, router: { ...router, balance: ["aux_loss", "seq_aux_loss"], aux_coeff: [0.05, 0.02] } } };
  test("has the numbers of one rank on any mesh, step by step", async () => {
    const alone = await stepsOf(jobWith(alike, { world: 1 }, ramp), sizes.length);
    expect(alone.steps.map(({ tokens }) => tokens / 16)).toEqual(sizes);
    for (const mesh of isFull ? meshes : meshes.slice(2, 3)) {
      const { steps, learnt } = await stepsOf(jobWith(alike, mesh, ramp), sizes.length);
      for (const [i, want] of alone.steps.entries()) {
        expect(steps[i]!.tokens).toBe(want.tokens);
        for (const name of ["loss", "aux_loss", "grad_norm"] as const)
          expect(Math.abs(steps[i]![name] / want[name] - 1), `${name} of step ${i} on ${JSON.stringify(mesh)}`).toBeLessThan(1e-3);
      }
      for (const [name, t] of alone.learnt) expect(distance(learnt.get(name)!.data, t.data), name).toBeLessThan(1e-3);
    }
  });

  test("fewer microbatches in the schedule of more: every stage runs all blocks, in order, with no more copies", () => {
    const runs = fc.record({
      most: fc.integer({ min: 1, max: 24 }),
      part: fc.double({ min: 0, max: 1, noNaN: true }),
      stages: fc.integer({ min: 1, max: 5 }),
      kind: fc.constantFrom("1f1b", "interleaved", "zero_bubble"),
    });
    fc.assert(
      fc.property(runs, ({ most, part, stages, kind }) => {
        const few = 1 + Math.floor(part * (most - 1));
        const chunks = kind === "interleaved" && stages > 1 ? 3 : 1;
        const of = (microbatches: number) =>
          schedule(
            {
              train: { ...jobWith({}, {}, {}).train, global_batch: microbatches },
              parallel: { ...jobWith({}, {}, {}).parallel, pipeline: stages, schedule: kind === "zero_bubble" ? kind : "1f1b" },
            },
            chunks,
          );
        const whole = of(most);
        const orders = whole.map((s) => orderOf({ order: [...s.order] }, few));
        expect(timesOf(orders, chunks).map((pieces) => pieces.map((p) => p.run))).toEqual(orders);
        for (const [stage, order] of orders.entries()) {
          expect(order.length).toBe((whole[stage]!.order.length / most) * few);
          const last = kind === "zero_bubble" ? "weights" : "backward";
          for (let chunk = 0; chunk < chunks; chunk++) {
            let flying = 0;
            for (const work of order.filter((w) => w.chunk === chunk)) {
              flying += Number(work.kind === "forward") - Number(work.kind === last);
              expect(flying).toBeLessThanOrEqual(whole[stage]!.copies[chunk]!);
            }
          }
        }
        // one forward, one backward: it is the order that so few would have
        if (kind === "1f1b") expect(orders).toEqual(of(few).map(({ order }) => order));
      }),
      { numRuns: draws(40, 200) },
    );
  });
});

describe("in fp16", () => {
  const fp16 = { precision: "fp16", global_batch: 8 };
  const meshes = [
    { world: 1 },
    { world: 2, tensor: 2, sequence: true },
    { world: 4, pipeline: 2, context: 2 },
    { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 2, distributed_optimizer: true },
  ];
  const model = {
    layers: isFull ? 2 : 1,
    moe: { ...moe, router: { ...router, balance: "aux_loss", aux_coeff: 0.05, expert_bias: false, score: "softmax" } },
  };

  test(
    "the scale falls from 2^32 by the documented rule until gradients are finite, the same way on all meshes; a step without room moves no weights",
    full,
    async () => {
      const count = 18;
      const train = { ...fp16, steps: count, optimizer: { type: "sgd", lr: 0.02 } };
      const exact = await stepsOf(jobWith(model, { world: 1 }, { ...train, precision: "fp32" }), 1);
      let first: StepResult[] | undefined;
      for (const mesh of isFull ? meshes : meshes.slice(0, 2)) {
        const job = jobWith(model, mesh, train);
        const run = await openRun(compile(job).plan, { baseDir: fixture("") });
        const rule = lossScaleOf(job.train.loss_scale!);
        const steps: StepResult[] = [];
        for (let before = await run.parameters(); steps.length < count; ) {
          const step = await run.step();
          steps.push(step);
          expect(step.loss_scale).toBe(rule.value());
          expect(Number.isFinite(step.grad_norm)).toBe(!step.skipped);
          const after = await run.parameters();
          for (const [name, t] of after) {
            expect(sameNumbers(t.data, before.get(name)!.data), name).toBe(step.skipped);
          }
          rule.done(step.skipped!);
          before = after;
        }
        await run.close();
        expect(steps.slice(0, 5).map(({ skipped, loss_scale }) => [skipped, loss_scale])).toEqual(
          [32, 32, 31, 30, 29].map((n) => [true, 2 ** n]),
        );
        expect(steps.filter((s) => !s.skipped).length).toBeGreaterThan(2);
        first ??= steps;
        // where it finds room is no matter of rounding: with half the scale all numbers are half as large
        expect(steps.map((s) => s.skipped)).toEqual(first.map((s) => s.skipped));
        // fp16 keeps 11 bits: 2^-12 relative per rounding, a few dozen of them on the way to the loss; and choices between near equals
        expect(Math.abs(steps[0]!.loss - exact.steps[0]!.loss)).toBeLessThan(1e-2);
        for (const [i, { loss }] of steps.entries()) expect(Math.abs(loss - first[i]!.loss), `loss of step ${i}`).toBeLessThan(2e-2);
      }
    },
  );

  test("gradients and their norm are those of the loss itself, whatever its scale, while the batch grows too", async () => {
    const dense = { layers: 2 };
    const of = async (train: object) => {
      const run = await openRun(compile(jobWith(dense, { world: 2, tensor: 2 }, train)).plan, { baseDir: fixture("") });
      const step = await run.step();
      const gradients = await run.gradients();
      const learnt = await run.parameters();
      await run.close();
      return { step, gradients, learnt };
    };
    const ramp = { global_batch: 8, batch_rampup: { start: 4, increment: 4, samples: 8 } };
    const want = await of({ ...ramp, precision: "fp32" });
    for (const loss_scale of [1, 1024, { initial: 65536 }]) {
      const got = await of({ ...ramp, precision: "fp16", loss_scale });
      expect(got.step.skipped).toBe(false);
      // without a scale small gradients of activations have lost their last bits, or all
      const off = loss_scale === 1 ? 3e-2 : 5e-3;
      expect(Math.abs(got.step.grad_norm / want.step.grad_norm - 1)).toBeLessThan(off);
      for (const name of ["embed", "layers.0.w1", "layers.1.wq", "head"])
        expect(distance(got.gradients.get(name)!.data, want.gradients.get(name)!.data), `${name} by ${loss_scale}`).toBeLessThan(off);
      for (const [name, t] of want.learnt) expect(distance(got.learnt.get(name)!.data, t.data), name).toBeLessThan(1e-3);
    }
  });

  test("a constant scale that is too large skips every step and does not change", async () => {
    const { steps, learnt } = await stepsOf(jobWith({ layers: 1 }, { world: 2 }, { ...fp16, loss_scale: 2 ** 40 }), 3);
    expect(steps.map((s) => [s.skipped, s.loss_scale])).toEqual([
      [true, 2 ** 40],
      [true, 2 ** 40],
      [true, 2 ** 40],
    ]);
    const { learnt: begun } = await stepsOf(jobWith({ layers: 1 }, { world: 2 }, fp16), 0);
    for (const [name, t] of begun) expect(sameNumbers(learnt.get(name)!.data, t.data), name).toBe(true);
  });
});
