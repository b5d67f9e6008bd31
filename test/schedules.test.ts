import { expect, test } from "vitest";
import { learningRate } from "../runtime/learningRate.ts";
import oracle from "./fixtures/lr-schedule.json" with { type: "json" };

type Optimizer = Parameters<typeof learningRate>[0];

test.each(oracle.cases)("Megatron Core's rates: $name", ({ optimizer, values }) => {
  for (const [step, rate] of values as [number, number][]) {
    expect(Math.abs(learningRate(optimizer as Optimizer, step) - rate)).toBeLessThanOrEqual(1e-12 * 1e-3);
  }
});

test("a constant rate is that number exactly, and no schedule divides by zero", () => {
  const base = { lr: 0.1, min_lr: 0.07, warmup_steps: 0, decay_steps: 1 };
  expect(learningRate({ ...base, schedule: "constant" }, 12)).toBe(0.1);
  expect(learningRate({ ...base, schedule: "cosine", warmup_steps: 5, decay_steps: 5 }, 5)).toBe(0.1);
  expect(learningRate({ ...base, schedule: "linear", warmup_steps: 5, decay_steps: 5 }, 6)).toBe(0.07);
});
