/** The number of rows an expert gets is known only while running: a plan holds a bound, and nothing is dropped in silence. */
import { expect, test } from "vitest";
import { openRun } from "../runtime/run.ts";
import { compile } from "../src/compile.ts";
import { fixture, jobOf } from "./support.ts";

const job = (rows_bound: number | "worst") =>
  jobOf({
    name: "bound",
    model: {
      layers: 2,
      hidden: 32,
      ffn: 32,
      heads: 4,
      vocab: 256,
      seq: 32,
      moe: { experts: 8, top_k: 2, ffn: 32, rows_bound, router: { balance: "none" } },
    },
    parallel: { world: 4, expert: 4 },
    train: { global_batch: 4, steps: 1, precision: "fp32", init_std: 0.3, optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });

test("a smaller bound takes less memory, and an exceeded one names the layer, the rank and the key to raise", async () => {
  const [tight, worst] = [compile(job(1)).plan, compile(job("worst")).plan];
  expect(tight.memory[0]!.activation[0]).toBeLessThan(worst.memory[0]!.activation[0]!);
  const run = await openRun(tight, { baseDir: fixture("") });
  await expect(run.step()).rejects.toThrow(/layers\.0\.moe\.\S+ rank \d: the router sent \d+ rows, and the plan holds at most 16/);
  await expect(run.step()).rejects.toMatchObject({ fix: expect.stringContaining("model.moe.rows_bound") });
});

test("with the worst case held, no routing overflows", async () => {
  const run = await openRun(compile(job("worst")).plan, { baseDir: fixture("") });
  expect((await run.step()).loss).toBeGreaterThan(0);
});
