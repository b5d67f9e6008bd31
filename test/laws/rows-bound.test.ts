/** Rows of experts and rounds of Sinkhorn's method are known only in a step: a plan has a bound, and a run that exceeds it ends with an error. */
import { expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";

const job = (rows_bound: number | "worst", more: object = { router: { balance: "none" } }, std = 0.3) =>
  jobOf({
    name: "bound",
    model: {
      layers: 2,
      hidden: 32,
      ffn: 32,
      heads: 4,
      vocab: 256,
      seq: 32,
      moe: { experts: 8, top_k: 2, ffn: 32, rows_bound, ...more },
    },
    parallel: { world: 4, expert: 4 },
    train: { global_batch: 4, steps: 1, precision: "fp32", init: { std }, optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });

test("a smaller bound needs less memory; an error of an exceeded bound names the layer, the rank and the key to raise", async () => {
  const [tight, worst] = [compile(job(1)).plan, compile(job("worst")).plan];
  expect(tight.memory[0]!.activation[0]).toBeLessThan(worst.memory[0]!.activation[0]!);
  const run = await openRun(tight, { baseDir: fixture("") });
  await expect(run.step()).rejects.toThrow(/layers\.0\.moe\.\S+ rank \d: the router sent \d+ rows, and the plan holds at most 16/);
  await expect(run.step()).rejects.toMatchObject({ fix: expect.stringContaining("model.moe.rows_bound") });
});

test("with rows_bound worst no routing overflows", async () => {
  const run = await openRun(compile(job("worst")).plan, { baseDir: fixture("") });
  expect((await run.step()).loss).toBeGreaterThan(0);
});

const rowsOf = (...more: object[]) =>
  more.map((m) => Math.max(...compile(job("worst", m)).plan.programs[0]!.buffers.map((b) => (b.ragged ? b.shape[0]! : 0))));

test("a capacity and expert choice bound the rows: no more memory is reserved", async () => {
  const router = { aux_coeff: 0.01 };
  const chosen = { type: "expert_choice", normalize_top_k: false };
  // 4 ranks of 32 tokens, and 2 experts on each: at worst every token comes to both
  const [worst, dropped, padded, chooses, few] = rowsOf(
    { router },
    { router, capacity: { factor: 1.25 } },
    { router, capacity: { factor: 1.25, pad: true } },
    { router: chosen },
    { router: chosen, capacity: { factor: 0.5 } },
  );
  expect([worst, dropped, padded, chooses, few]).toEqual([256, 80, 80, 64, 32]);
  // padded, the bound is what there is
  const run = await openRun(compile(job(1, { router, capacity: { factor: 1.25, pad: true } })).plan, { baseDir: fixture("") });
  expect((await run.step()).loss).toBeGreaterThan(0);
});

test("logits that Sinkhorn's method cannot balance end the run with an error that names the layer", async () => {
  const router = { balance: "sinkhorn", normalize_top_k: false };
  const calm = await openRun(compile(job("worst", { router })).plan, { baseDir: fixture("") });
  expect((await calm.step()).loss).toBeGreaterThan(0);
  const wild = await openRun(compile(job("worst", { router }, 100)).plan, { baseDir: fixture("") });
  await expect(wild.step()).rejects.toThrow(/layers\.\d\.moe\.sinkhorn\.rounds, rank \d: .* not even after 1000 rounds/);
});
