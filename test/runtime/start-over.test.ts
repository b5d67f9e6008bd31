/** Runs that begin from weights alone, and steps whose data is read over. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { stepRanges } from "../../src/cli/options.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-start-over-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const moe = { experts: 4, top_k: 2, ffn: 16, router: { score: "sigmoid", expert_bias: true, balance: "none" } };
const planOf = (parallel: object = {}, optimizer: object = {}) =>
  compile(
    jobOf({
      name: "over",
      model: { layers: 2, hidden: 16, heads: 2, vocab: 256, seq: 16, moe },
      parallel,
      train: { global_batch: 4, steps: 4, precision: "fp32", optimizer: { lr: 1e-2, ...optimizer } },
      data: { path: "corpus.txt" },
    }),
  ).plan;
const baseDir = fixture("");

test("only the weights: another optimizer, another mesh, the first step and its data", async () => {
  const trained = await openRun(planOf(), { baseDir, save: folder });
  for (let step = 0; step < 2; step++) await trained.step();
  await trained.save();
  const weights = await trained.parameters();
  await trained.close();

  const plan = planOf({ world: 2, pipeline: 2 }, { type: "sgd" });
  await expect(openRun(plan, { baseDir, resume: folder })).rejects.toThrow("train.optimizer.type adamw, and the job has sgd");
  const run = await openRun(plan, { baseDir, resume: folder, only: "weights" });
  expect(run.progress()).toMatchObject({ steps: 0, read: 0, trained: 0, updates: 0 });
  expect(await run.parameters()).toEqual(weights);
  expect((await run.step()).lr).toBe(1e-2);
  await run.close();
  await expect(openRun(plan, { baseDir, only: "weights" })).rejects.toThrow("--only weights needs --resume with a checkpoint");
});

test("a step that is skipped trains nothing; the next one has the data that it would have had", async () => {
  // so small a rate changes almost nothing; the bias of experts moves on its own
  const still = planOf({}, { lr: 1e-9 });
  const [all, some] = await Promise.all([openRun(still, { baseDir }), openRun(still, { baseDir })]);
  await all.step();
  await all.step();
  const want = await all.step();
  const before = await some.parameters();
  some.skipStep();
  some.skipStep();
  expect(await some.parameters()).toEqual(before);
  const got = await some.step();
  expect(got.step).toBe(3);
  expect(some.progress()).toMatchObject({ steps: 3, read: 12, trained: 4, updates: 1 });
  expect(Math.abs(got.loss - want.loss)).toBeLessThan(1e-3);
  await Promise.all([all.close(), some.close()]);
});

test("steps to skip are a list of steps and ranges", () => {
  expect(stepRanges("100-110,250")).toEqual([
    [100, 110],
    [250, 250],
  ]);
  for (const wrong of ["", "0", "5-3", "a", "1,,2", "-4"]) expect(() => stepRanges(wrong)).toThrow("not a list of steps");
});
