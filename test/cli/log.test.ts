/**
 * The log of a run. The event file of the fixture was read by TensorBoard 2.21.0 (event_accumulator.EventAccumulator); tensorboard.json has
 * what it found.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { attentionShare } from "../../runtime/train/feed.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import type { StepResult } from "../../schemas/stepResult.ts";
import { attentionFlops, modelFlops } from "../../src/analysis/modelFlops.ts";
import { crc32c, firstRecord, type LoggedValue, stepRecord } from "../../src/cli/log/eventFile.ts";
import { openRunLog } from "../../src/cli/log/runLog.ts";
import { stepScalars } from "../../src/cli/log/scalars.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-log-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const expected = JSON.parse(readFileSync(fixture("logs/tensorboard.json"), "utf8"));
const steps: readonly (readonly [number, number, readonly LoggedValue[]])[] = [
  [
    1796028256.25,
    1,
    [
      { tag: "lm loss", value: 5.5 },
      { tag: "moe/tokens", values: [33, 50, 73, 100], buckets: 4 },
    ],
  ],
  [
    1796028257.5,
    300,
    [
      { tag: "lm loss", value: Number.NaN },
      { tag: "größe/α", value: -1e30 },
      { tag: "moe/tokens", values: [7, 7] },
    ],
  ],
];

test("the checksum is CRC-32C", () => {
  expect(crc32c(new TextEncoder().encode("123456789"))).toBe(0xe3069283);
});

test("an event file has the bytes that TensorBoard has read", () => {
  const made = Buffer.concat([firstRecord(1796028256), ...steps.map((step) => stepRecord(...step))]);
  expect(made.toString("base64")).toBe(readFileSync(fixture("logs/events.out.tfevents.1796028256.fixture")).toString("base64"));
  expect(expected.scalars["lm loss"]).toEqual([
    [1796028256.25, 1, 5.5],
    [1796028257.5, 300, "NaN"],
  ]);
  expect(expected.scalars["größe/α"]).toEqual([[1796028257.5, 300, Math.fround(-1e30)]]);
  expect(expected.histograms["moe/tokens"][0]).toEqual([
    1796028256.25,
    1,
    [33, 100, 4, 256, 18918],
    [33, 49.75, 66.5, 83.25, 100],
    [0, 1, 1, 1, 1],
  ]);
  expect(expected.histograms["moe/tokens"][1][2]).toEqual([7, 7, 2, 14, 98]);
});

const moe = { experts: 4, top_k: 2, ffn: 16, router: { score: "sigmoid", expert_bias: true, balance: "none" } };
const job = (parallel: object = {}) =>
  jobOf({
    name: "logged",
    model: { layers: 2, hidden: 16, heads: 2, vocab: 256, seq: 16, moe },
    parallel,
    train: { global_batch: 4, steps: 4, precision: "fp32", optimizer: { lr: 1e-2 }, evaluation: { every: 2, steps: 1 } },
    data: { path: "corpus.txt", split: [9, 1] },
  });

test("a folder has the scalars of each interval, and continues after a resume", async () => {
  const { plan } = compile(job({ world: 2, pipeline: 2 }));
  const run = await openRun(plan, { baseDir: fixture("") });
  const at = join(folder, "one");
  let log = openRunLog(plan, { folder: at, interval: 2, steps: 0 });
  const losses: number[] = [];
  for (let step = 1; step <= 4; step++) {
    const result = await run.step({ detailed: log.isDue(step) });
    losses.push(result.loss);
    log.add(result, run.progress().read);
    expect(result.expert_loads?.length).toBe(step % 2 ? undefined : 2);
    // each token of each layer chose two experts
    for (const counts of result.expert_loads ?? []) expect(counts.reduce((a, b) => a + b, 0)).toBe(2 * result.tokens);
    if (step === 2) {
      log.addEvaluation(await run.evaluate("validation"));
      expect(() => openRunLog(plan, { folder: at, interval: 2, steps: 0 })).toThrow("has the log of a run already");
      log = openRunLog(plan, { folder: at, interval: 2, steps: 2 });
    }
  }
  await run.close();
  const [head = "", ...rows] = readFileSync(join(at, "metrics.csv"), "utf8").trimEnd().split("\n");
  const table = rows.map((row) => Object.fromEntries(head.split(",").map((name, i) => [name, row.split(",")[i]])));
  expect(table.map((row) => row.step)).toEqual(["2", "4"]);
  expect(Number(table[1]?.["lm loss"])).toBeCloseTo(((losses[2] ?? 0) + (losses[3] ?? 0)) / 2, 10);
  expect(table[1]).toMatchObject({ samples: "16", tokens: "256", "batch-size": "4" });
  expect([Number(table[0]?.["moe/expert bias min"]), Number(table[0]?.["moe/expert bias max"])]).toEqual([
    expect.closeTo(-2e-3, 3),
    expect.closeTo(2e-3, 3),
  ]);
  const lines = readFileSync(join(at, "metrics.jsonl"), "utf8")
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(lines.map((line) => [line.step, "lm loss" in line, "lm loss validation" in line])).toEqual([
    [2, true, false],
    [2, false, true],
    [4, true, false],
  ]);
  expect(
    readFileSync(join(at, "evaluations.csv"), "utf8")
      .split("\n")
      .slice(0, 2)
      .map((line) => line.split(",").slice(0, 3)),
  ).toEqual([
    ["step", "part", "source"],
    ["2", "validation", ""],
  ]);
  expect(readdirSync(at).filter((name) => name.startsWith("events.out.tfevents.")).length).toBeGreaterThan(0);
});

test("model FLOP: 6 for each token and each parameter that it uses, and causal attention", () => {
  const { model } = job();
  const [D, S, V, E, k, F] = [16, 16, 256, 4, 2, 16];
  const layer = 4 * D * D + D * E + k * 3 * D * F;
  // norms and biases of experts count like other parameters
  const small = 2 * (2 * D + k) + D;
  expect(modelFlops(model)).toBe(6 * S * (2 * layer + V * D + small) + 6 * S * S * 2 * D);
  expect(attentionFlops(model)).toBe(6 * S * S * 2 * D);
});

test("attention within documents counts the pairs of tokens in them", () => {
  // two sequences of 4 tokens: one document, and documents of 1 and 3 tokens
  expect(attentionShare(Int32Array.of(0, 0, 0, 0, 0, 1, 1, 1), 4)).toBeCloseTo((10 + 1 + 6) / 20, 12);
  const plan = { ranks: 2, batch: 1, seq: 4, flops: 100, attention: 40, peak: 1e12, memory: 1 };
  const step = { step: 1, loss: 1, aux_loss: 0, grad_norm: 1, lr: 1, tokens: 8, seconds: 2, data_wait_seconds: 0 };
  const throughput = (last: StepResult) => stepScalars({ last, steps: [last], samples: 2 }, plan).throughput;
  expect(throughput(step)).toBeCloseTo((2 * 100) / 2 / 2 / 1e12, 20);
  expect(throughput({ ...step, attention_share: 0.25 })).toBeCloseTo((2 * 70) / 2 / 2 / 1e12, 20);
});

test("depths of multi-token prediction and memory are scalars of the log, the memory with its maximum", () => {
  const plan = { ranks: 1, batch: 1, seq: 4, flops: 1, attention: 0, peak: undefined, memory: 7 };
  const step = { step: 1, loss: 1, aux_loss: 0, grad_norm: 1, lr: 1, tokens: 4, seconds: 1, data_wait_seconds: 0 };
  const last = { ...step, mtp_losses: [2, 4], memory_bytes: 5, parameter_norm: 3, router_entropy: 0.5 };
  const steps = [{ ...step, mtp_losses: [4, 8], router_entropy: 1 }, last];
  expect(stepScalars({ last, steps, samples: 2, largestMemory: 6 }, plan)).toMatchObject({
    ...{ "mtp loss/depth 1": 3, "mtp loss/depth 2": 6, "params-norm": 3, "moe/router entropy": 0.75 },
    ...{ "mem-allocated-bytes": 5, "mem-max-allocated-bytes": 6, "mem-planned-bytes": 7 },
  });
});
