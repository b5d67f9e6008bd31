/** Learning rate, weight decay, loss scale and batch size over a run: the schedules are Megatron Core's. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { learningRate, weightDecay } from "../../runtime/train/learningRate.ts";
import { lossScaleOf } from "../../runtime/train/lossScale.ts";
import { trainingSchedule } from "../../runtime/train/stepParameters.ts";
import { type batchAt, lengthOf, phasesOf, samplesOf } from "../../schemas/batchRampup.ts";
import type { Job } from "../../schemas/job.ts";
import { jobOf } from "../support/job.ts";
import { byId, type Named, near, oracle } from "../support/oracle.ts";

type Written = Readonly<Record<string, unknown>>;
const jobWith = (train: Written, optimizer: Written = {}): Job =>
  jobOf({
    name: "course",
    model: { layers: 1, hidden: 16, heads: 4, vocab: 256, seq: 8 },
    train: { steps: 1000, global_batch: 16, ...train, optimizer: { lr: 1e-3, ...optimizer } },
    data: { path: "x" },
  });
const trainOf = (...written: Parameters<typeof jobWith>): Job["train"] => jobWith(...written).train;

describe("Megatron Core's schedules", () => {
  interface Case extends Named {
    readonly name: string;
    readonly optimizer: Written;
    readonly iterations?: readonly number[];
    readonly lr: readonly number[];
    readonly weight_decay?: readonly number[];
  }
  const { cases, iterations, global_batch, steps } = oracle<{ cases: Case[]; iterations: number[]; global_batch: number; steps: number }>(
    "lr-schedule",
  );

  test("all 16 cases apply, those of every shape", () => {
    expect(cases.length).toBe(16);
    const shapes = cases.map(({ optimizer: o }) => [o.schedule, o.wsd_decay, o.weight_decay_schedule].filter(Boolean).join(" "));
    expect([...new Set(shapes)].sort()).toMatchInlineSnapshot(`
      [
        "constant constant",
        "cosine constant",
        "cosine linear",
        "inverse_square_root constant",
        "linear constant",
        "linear cosine",
        "wsd cosine constant",
        "wsd exponential constant",
        "wsd linear constant",
        "wsd minus_sqrt constant",
      ]
    `);
  });
  test.each(byId(cases))("%s", (_, { name, optimizer, iterations: own = iterations, lr, weight_decay }) => {
    const train = trainOf({ global_batch, steps }, optimizer);
    for (const [i, step] of own.entries()) {
      near(learningRate(train, step * global_batch), lr[i]!, 1e-12, `${name}: rate after ${step} steps`, 1e-18);
      const decay = weight_decay?.[i] ?? (optimizer.weight_decay as number);
      near(weightDecay(train, step * global_batch), decay, 1e-12, `${name}: weight decay after ${step} steps`, 1e-18);
    }
  });
});

test("a constant rate is that number exactly, and no schedule divides by zero", () => {
  const rate = (optimizer: Written, step: number) =>
    learningRate(
      { global_batch: 16, optimizer: { ...trainOf({}).optimizer, lr: 0.1, min_lr: 0.07, ...optimizer } as Job["train"]["optimizer"] },
      16 * step,
    );
  expect(rate({ schedule: "constant" }, 12)).toBe(0.1);
  for (const schedule of ["cosine", "linear", "wsd", "inverse_square_root"]) {
    expect(rate({ schedule, warmup_steps: 5, decay_steps: 5, wsd_decay_steps: 0 }, 5)).toBe(0.1);
    expect(rate({ schedule, warmup_steps: 5, decay_steps: 5, wsd_decay_steps: 0 }, 6)).toBe(0.07);
    expect(rate({ schedule, warmup_steps: 0, decay_steps: 0, wsd_decay_steps: 0 }, 0)).not.toBeNaN();
  }
  // Megatron takes a warm-up of no sample for one of one sample
  expect(rate({ schedule: "inverse_square_root", decay_steps: 10 }, 0)).toBe(0.1);
  expect(rate({ schedule: "inverse_square_root", decay_steps: 10, min_lr: 0 }, 4)).toBeCloseTo(0.1 / 8, 15);
});

describe("batch-size ramp-up", () => {
  const ramp = { global_batch: 32, batch_rampup: { start: 8, increment: 8, samples: 90 } };
  /** Megatron's rule, step by step. */
  const played = ({ global_batch, batch_rampup: r }: Parameters<typeof batchAt>[0], steps: number): number[] => {
    const sizes: number[] = [];
    for (let read = 0; sizes.length < steps; read += sizes.at(-1)!) {
      const each = r!.samples / ((global_batch - r!.start) / r!.increment);
      sizes.push(read > r!.samples ? global_batch : r!.start + Math.floor(read / each) * r!.increment);
    }
    return sizes;
  };

  test("grows in equal increments with the samples read", () => {
    expect(played(ramp, 12)).toEqual([8, 8, 8, 8, 16, 16, 24, 24, 32, 32, 32, 32]);
    expect(phasesOf(ramp)).toEqual([
      { batch: 8, from: 0, steps: 4 },
      { batch: 16, from: 32, steps: 2 },
      { batch: 24, from: 64, steps: 2 },
      { batch: 32, from: 112, steps: Infinity },
    ]);
    expect([0, 1, 5, 8, 10].map((steps) => samplesOf(ramp, steps))).toEqual([0, 8, 48, 112, 176]);
    expect(lengthOf({ ...ramp, steps: 10 })).toBe(176 / 32);
  });
  test("phases give the same batches as single steps", () => {
    const ramps = fc.record({
      start: fc.integer({ min: 1, max: 40 }),
      increment: fc.integer({ min: 1, max: 30 }),
      times: fc.integer({ min: 1, max: 40 }),
      samples: fc.integer({ min: 1, max: 5000 }),
    });
    fc.assert(
      fc.property(ramps, ({ start, increment, times, samples }) => {
        const train = { global_batch: start + times * increment, batch_rampup: { start, increment, samples } };
        const all = phasesOf(train).flatMap(({ batch, steps }) => Array.from({ length: Number.isFinite(steps) ? steps : 3 }, () => batch));
        expect(all).toEqual(played(train, all.length));
        expect(all.at(-1)).toBe(train.global_batch);
        expect(samplesOf(train, all.length)).toBe(all.reduce((sum, b) => sum + b, 0));
      }),
      { numRuns: 300 },
    );
  });
  test("schedules count samples: a decay that is not written ends with the run, and a warm-up is as long in samples as without", () => {
    const job = jobWith({ ...ramp, steps: 10 }, { schedule: "linear", warmup_steps: 2 });
    expect(job.train.optimizer.decay_steps).toBe(176 / 32);
    const trainingPlan = trainingSchedule(job);
    const legs = Array.from({ length: 11 }, () => {
      const parameters = trainingPlan.next();
      trainingPlan.done("updated");
      return parameters;
    });
    expect(legs.map(({ batch }) => batch)).toEqual([8, 8, 8, 8, 16, 16, 24, 24, 32, 32, 32]);
    expect(legs.map(({ first }) => first)).toEqual([0, 8, 16, 24, 32, 48, 64, 88, 112, 144, 176]);
    expect(legs.map(({ microbatches, upscale }) => microbatches * upscale)).toEqual(legs.map(() => 32));
    // 64 samples of warm-up: half of it after 32
    expect(legs[4]!.lr).toBeCloseTo(0.5e-3, 12);
    expect(legs[6]!.lr).toBeCloseTo(1e-3, 12);
    expect(legs[10]!.lr).toBeCloseTo(0, 12);
  });
});

describe("Megatron Core's loss scale", () => {
  /** `+` a step that went well, `-` one that overflowed: the scale of each, and of the one after. */
  const scales = (how: NonNullable<Job["train"]["loss_scale"]>, steps: string): number[] => {
    const scale = lossScaleOf(how);
    const before = [...steps].map((step) => {
      const value = scale.value();
      scale.done(step === "-");
      return value;
    });
    return [...before, scale.value()];
  };
  const how = { initial: 64, growth: 2, growth_interval: 3, backoff: 0.5, hysteresis: 2, min: 4 };

  test("a number stays", () => expect(scales(8, "--++--")).toEqual([8, 8, 8, 8, 8, 8, 8]));
  test("the first overflow is ignored, and no further one until the scale has grown", () => {
    expect(scales(how, "---")).toEqual([64, 64, 32, 16]);
    expect(scales(how, "-++-++-")).toEqual([64, 64, 64, 64, 32, 32, 32, 16]);
    expect(scales(how, "-+++--")).toEqual([64, 64, 64, 64, 128, 128, 64]);
  });
  test("the scale grows after a number of consecutive steps, counted from the last overflow or growth", () => {
    expect(scales(how, "+++++++")).toEqual([64, 64, 64, 128, 128, 128, 256, 256]);
    expect(scales(how, "++-++-+++")).toEqual([64, 64, 64, 64, 64, 64, 32, 32, 32, 64]);
  });
  test("it is never below the least, nor so large that nothing is left of a gradient that is divided by it", () => {
    expect(scales(how, "-------").at(-1)).toBe(4);
    expect(scales({ ...how, initial: 2 ** 99, growth_interval: 1 }, "+++").at(-1)).toBe(2 ** 100);
  });
  test("an overflowing step changes no parameter and no schedule, but consumes its data", () => {
    const job = jobWith({ precision: "fp16", loss_scale: how }, { schedule: "linear", warmup_steps: 10 });
    const trainingPlan = trainingSchedule(job);
    const legs = (["updated", "overflowed", "overflowed", "updated"] as const).map((outcome) => {
      const parameters = trainingPlan.next();
      trainingPlan.done(outcome);
      return parameters;
    });
    expect(legs.map(({ update }) => update)).toEqual([1, 2, 2, 2]);
    expect(legs.map(({ lr }) => Number(lr.toPrecision(9)))).toEqual([0, 1e-4, 1e-4, 1e-4]);
    expect(legs.map(({ first }) => first)).toEqual([0, 16, 32, 48]);
    expect(legs.map(({ lossScale }) => lossScale)).toEqual([64, 64, 64, 32]);
  });
});
