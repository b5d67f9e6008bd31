/**
 * Asynchronous collectives on GPUs of this machine, one process a rank: losses are those of collectives in order, bit for bit, and a step is
 * no slower. Skipped, with the reason, where there are fewer than two GPUs. `npx vitest run test/runtime/cuda-overlap.test.ts` is the whole check.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { stringify } from "yaml";
import { driver } from "../../runtime/cuda/driver.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";
import { rankcProcess } from "../support/rankc.ts";

const gpus = ((): number | string => {
  try {
    return driver().devices.length;
  } catch (error) {
    return (error as Error).message.split(/[;\n]/)[0] ?? "no driver";
  }
})();
const missing = typeof gpus === "string" ? ` [skipped: ${gpus}]` : gpus < 2 ? ` [skipped: ${gpus} GPU, two are needed]` : "";
const folder = mkdtempSync(join(tmpdir(), "rankc-overlap-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const jobFor = (parallel: object) => ({
  name: "overlap",
  model: {
    ...{ layers: 8, hidden: 1024, ffn: 2048, heads: 16, kv_heads: 4, head_dim: 64, vocab: 256, seq: 1024 },
    moe: { experts: 8, top_k: 2, ffn: 1024, shared: { ffn: 1024, gate: true }, router: { aux_coeff: 0.01 } },
  },
  parallel: { world: 2, expert: 2, distributed_optimizer: true, ...parallel },
  train: { micro_batch: 2, global_batch: 16, steps: 20, precision: "bf16", optimizer: { lr: 1e-4 } },
  data: { path: fixture("corpus.txt") },
});
const overlaps = { gradient_bucket: 40, parameter_bucket: 20, expert_overlap: "shared" };

test("the two jobs of the check differ in their streams alone", () => {
  const [plain, beside] = [{}, overlaps].map((parallel) => compile(jobOf(jobFor(parallel))).plan.programs[0]?.streams);
  expect(plain).toBeUndefined();
  expect(beside?.map(({ name }) => name)).toEqual(["experts", "gradients", "parameters"]);
});

describe.skipIf(missing)(`on GPUs of this machine${missing}`, () => {
  /** Runs a job on two GPUs. Returns the losses, and the median of the seconds of the steps after the graphs are captured. */
  async function run(name: string, parallel: object) {
    const [job, metrics] = [join(folder, `${name}.yaml`), join(folder, `${name}.jsonl`)];
    writeFileSync(job, stringify(jobFor(parallel)));
    const { exit, err } = await rankcProcess("run", job, "--backend", "cuda", "--metrics", metrics);
    expect(err).not.toContain("error");
    expect(exit).toBe(0);
    const steps = readFileSync(metrics, "utf8")
      .split("\n")
      .filter((line) => line.includes('"loss"'))
      .map((line) => JSON.parse(line) as { loss: number; seconds: number });
    const seconds = steps.slice(4).map((s) => s.seconds);
    return { losses: steps.map(({ loss }) => loss), median: seconds.sort((a, b) => a - b)[Math.floor(seconds.length / 2)] ?? 0 };
  }

  test("losses of twenty steps are the same bits; the time of a step is printed", async () => {
    const [plain, beside] = [await run("in-order", {}), await run("beside", overlaps)];
    expect(plain.losses).toHaveLength(20);
    expect(beside.losses).toEqual(plain.losses);
    console.log(`median step: ${(1e3 * plain.median).toFixed(2)} ms in order, ${(1e3 * beside.median).toFixed(2)} ms beside compute`);
  });
});
