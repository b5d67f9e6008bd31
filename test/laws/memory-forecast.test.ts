/** The memory of a job in closed form: its activation copies are those of the schedule, and it is near the exact peak. */
import { expect, test } from "vitest";
import { activationCopies, memoryForecast } from "../../src/analysis/memoryForecast.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { schedule } from "../../src/passes/schedule.ts";
import { peakOf } from "../../src/rules/all.ts";
import { jobRules } from "../../src/rules/jobRules.ts";
import { choicesOf, jobWith } from "../../src/search/choice.ts";
import { jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";
import { draws } from "../support/tiers.ts";

const job = jobOf({
  name: "forecast",
  model: {
    layers: 64,
    hidden: 2048,
    heads: 16,
    ffn: 4096,
    vocab: 32000,
    seq: 4096,
    moe: { experts: 32, top_k: 4, ffn: 1024, rows_bound: 1.5 },
  },
  parallel: { world: 64, distributed_optimizer: true },
  train: { global_batch: 1024, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
  cluster: { device: "h200-141gb", gpus_per_node: 8 },
});

test("activation copies are those of the schedule, as the mean of a stage's chunks, with many microbatches", () => {
  for (const pipeline of [2, 4, 8, 16])
    for (const virtual_pipeline of [1, 2, 3, 4, 5, 8]) {
      for (const inPairs of [false, true]) {
        const asked = inPairs ? ({ expert: 2, expert_overlap: "interleave" } as const) : {};
        const parallel = { ...job.parallel, pipeline, virtual_pipeline, data: 4, ...asked };
        const copies = schedule({ ...job, parallel }, virtual_pipeline).map((stage) => stage.copies);
        for (const [stage, own] of copies.entries()) {
          const mean = own.reduce((a, b) => a + b, 0) / virtual_pipeline;
          // one copy more or less on one chunk, where chunks of the two halves meet
          const off = Math.abs(activationCopies(parallel, stage, inPairs) - mean);
          expect(off, `${pipeline} ${virtual_pipeline} ${stage} ${inPairs}`).toBeLessThanOrEqual(2 / virtual_pipeline);
        }
      }
    }
});

test("the forecast of pairs of microbatches has their copies: it is near the exact peak, with and without a pipeline", async () => {
  const target = await loadTarget("cuda:sm_90a");
  for (const own of [{ expert: 8 }, { expert: 8, pipeline: 4 }, { expert: 8, pipeline: 4, virtual_pipeline: 2 }]) {
    const data = job.parallel.world / ("pipeline" in own ? own.pipeline : 1);
    const paired = { ...job, parallel: { ...job.parallel, ...own, data, expert_overlap: "interleave" as const } };
    const single = { ...paired, parallel: { ...paired.parallel, expert_overlap: "none" as const } };
    const forecast = memoryForecast(paired);
    expect(Math.abs(forecast / peakOf(paired, target).bytes - 1), JSON.stringify(own)).toBeLessThan(0.15);
    expect(forecast).toBeGreaterThanOrEqual(memoryForecast(single));
  }
});

test("the forecast of random choices that need more than 20 GiB is near the exact peak: 4 % on average, none beyond 15 %", async () => {
  const target = await loadTarget("cuda:sm_90a");
  const next = random(11);
  const all = [...choicesOf(job, {})];
  const errors: number[] = [];
  while (errors.length < draws(6, 40)) {
    const choice = all[Math.floor(((next() + 1) / 2) * all.length)];
    if (!choice || choice.recompute === "full") continue;
    const candidate = jobWith(job, choice);
    const forecast = memoryForecast(candidate);
    if (forecast < 20 * 2 ** 30 || forecast > 200 * 2 ** 30) continue;
    if (jobRules.some((rule) => rule.level === "error" && [...rule.check(candidate)].length > 0)) continue;
    errors.push(Math.abs(forecast / peakOf(candidate, target).bytes - 1));
  }
  expect(Math.max(...errors)).toBeLessThan(0.15);
  expect(errors.reduce((a, b) => a + b, 0) / errors.length).toBeLessThan(0.04);
});
