/** The dashboard of a run: its frame fits the terminal, and shows loss, speed, memory, experts and evaluations. */
import { expect, test } from "vitest";
import type { StepResult } from "../../schemas/stepResult.ts";
import { Dashboard } from "../../src/cli/log/dashboard.ts";

const plan = { ranks: 2, batch: 4, seq: 16, attention: 0, flops: 1e9, peak: 1e12, memory: 3 * 2 ** 30 };
const step = (n: number, loss: number): StepResult => ({
  ...{ step: n, loss, aux_loss: 0, grad_norm: 1.25, lr: 1e-3, tokens: 64, seconds: 0.5, data_wait_seconds: 0 },
  ...{
    expert_load: 2,
    expert_loads: [
      [16, 16],
      [32, 0],
    ],
  },
});

test("a frame shows the course of the loss and the last numbers", () => {
  const dashboard = new Dashboard({ name: "job", steps: 100, plan });
  expect(dashboard.frame(80)).toEqual([]);
  for (let n = 1; n <= 50; n++) dashboard.add(step(n, 6 - n / 25));
  dashboard.addEvaluation({ step: 50, part: "validation", loss: 4.25, perplexity: 70.1, tokens: 64, sources: [], seconds: 1 });
  const frame = dashboard.frame(80);
  expect(frame[0]).toBe("job   step 50 of 100   25 s left");
  const chart = frame.slice(1, 9);
  // from the highest loss at the left to the lowest at the right
  expect(chart[0]).toMatch(/^ {4}5\.960 [\u2801-\u28ff]/u);
  expect(chart[7]).toMatch(/^ {4}4\.000 .*[\u2801-\u28ff]$/u);
  expect(frame.slice(9)).toEqual([
    "loss 4.0000   grad norm 1.250   lr 1.00e-3",
    "128 tokens/s   0.00400 TFLOP/s per rank   0.40 % of peak   memory 3.00 GiB",
    "experts: busiest 2.00 x the mean   ▁▃",
    "validation loss 4.2500   perplexity 70.100   at step 50",
  ]);
  for (const columns of [20, 60, 300])
    for (const line of dashboard.frame(columns)) expect(line.length).toBeLessThanOrEqual(Math.min(120, Math.max(40, columns - 1)));
});

test("losses that are not finite leave a gap", () => {
  const dashboard = new Dashboard({ name: "job", steps: 2, plan });
  dashboard.add(step(1, Number.NaN));
  expect(dashboard.frame(80)[1]).not.toContain("NaN");
  dashboard.add(step(2, 5));
  expect(dashboard.frame(80)[1]).toContain("5.000");
});
