/**
 * Asynchronous collectives on GPUs of this machine, one process a rank, over NCCL: losses are those of collectives in order, bit for bit, in
 * CUDA graphs of several streams and without graphs, and collectives run while kernels run. Skipped, with the reason, where there are fewer
 * than two GPUs. `node node_modules/vitest/vitest.mjs run test/runtime/cuda-overlap.test.ts` is the whole check.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { stringify } from "yaml";
import { driver } from "../../runtime/cuda/driver.ts";
import { compile } from "../../src/compile.ts";
import { processOf } from "../bench/traceTables.ts";
import { fixture, jobOf } from "../support/job.ts";
import { rankcProcess } from "../support/rankc.ts";
import { byTier } from "../support/tiers.ts";

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
/** Two ranks: a sum of two terms has the same bits in either order, so that the order of NCCL's sums is of no account. */
const overlaps: Readonly<Record<string, { readonly parallel: object; readonly streams: readonly string[] | undefined }>> = {
  "in order": { parallel: {}, streams: undefined },
  "gradients in buckets": { parallel: { gradient_bucket: 40 }, streams: ["gradients"] },
  "parameters in buckets": { parallel: { parameter_bucket: 20 }, streams: ["parameters"] },
  "parameters in buckets, gathered in forward": {
    parallel: { parameter_bucket: 20, parameter_gather: "forward" },
    streams: ["parameters"],
  },
  "shared experts beside exchanges": { parallel: { expert_overlap: "shared" }, streams: ["experts"] },
  "two microbatches in pairs": { parallel: { expert_overlap: "interleave" }, streams: ["experts"] },
  "all of them": {
    parallel: { gradient_bucket: 40, parameter_bucket: 20, parameter_gather: "forward", expert_overlap: "shared", communication_sms: 16 },
    streams: ["experts", "gradients", "parameters"],
  },
};
const [, ...asynchronous] = Object.entries(overlaps);
const all = overlaps["all of them"]!;

for (const { options, rows } of byTier(Object.entries(overlaps), ([name]) => name === "in order" || name === "all of them"))
  test.each(rows)("the plan of the job has the streams of its keys: %s", options, (_, { parallel, streams }) => {
    expect(compile(jobOf(jobFor(parallel))).plan.programs[0]?.streams?.map(({ name }) => name)).toEqual(streams);
  });

describe.skipIf(missing)(`on GPUs of this machine${missing}`, () => {
  /** Runs a job on two GPUs. Returns the losses, and the median of the seconds of the steps after the graphs are captured. */
  async function run(name: string, parallel: object, ...options: string[]) {
    const [job, metrics] = [join(folder, `${name}.yaml`), join(folder, `${name}.jsonl`)];
    writeFileSync(job, stringify(jobFor(parallel)));
    const { exit, err } = await rankcProcess("run", job, "--backend", "cuda", "--target", "cuda:sm_90a", "--metrics", metrics, ...options);
    expect(err).not.toContain("error");
    expect(exit, err).toBe(0);
    const steps = readFileSync(metrics, "utf8")
      .split("\n")
      .filter((line) => line.includes('"loss"'))
      .map((line) => JSON.parse(line) as { loss: number; seconds: number });
    const seconds = steps.slice(4).map((s) => s.seconds);
    const median = seconds.sort((a, b) => a - b)[Math.floor(seconds.length / 2)] ?? 0;
    console.log(`${name}: median step ${(1e3 * median).toFixed(2)} ms`);
    return { losses: steps.map(({ loss }) => loss), median };
  }
  let inOrder: readonly number[];
  beforeAll(async () => {
    inOrder = (await run("in order", {})).losses;
  });

  test("losses differ from step to step, and are numbers", () => {
    expect(inOrder).toHaveLength(20);
    expect(inOrder.every(Number.isFinite)).toBe(true);
    expect(new Set(inOrder).size).toBeGreaterThan(10);
  });

  test.each(asynchronous)(
    "losses of twenty steps, the last eighteen of them replays of a graph, are the same bits: %s",
    async (name, o) => {
      expect((await run(name, o.parallel)).losses).toEqual(inOrder);
    },
  );

  test("losses are the same bits without graphs, and collectives of each stream run while kernels run", async () => {
    const trace = join(folder, "trace.json");
    const { losses } = await run("all of them, without graphs", all.parallel, "--no-graph", "--profile", trace);
    expect(losses).toEqual(inOrder);
    const besides = besideCompute(readFileSync(trace, "utf8"));
    console.log(
      Object.entries(besides)
        .map(([stream, { total, hidden }]) => `${stream}: ${hidden.toFixed(0)} of ${total.toFixed(0)} us`)
        .join(", "),
    );
    for (const stream of all.streams ?? []) expect(besides[stream]?.hidden, stream).toBeGreaterThan(0);
  });
});

/** Returns, per stream of a trace, the µs of its work, and how many of them kernels ran as well. */
function besideCompute(trace: string): Record<string, { total: number; hidden: number }> {
  interface Event {
    readonly ph: string;
    readonly name: string;
    readonly pid: number;
    readonly tid: number;
    readonly ts: number;
    readonly dur: number;
    readonly args: { readonly name: string };
  }
  const { traceEvents } = JSON.parse(trace) as { readonly traceEvents: readonly Event[] };
  const names = new Map(traceEvents.filter(({ name }) => name === "thread_name").map(({ tid, args }) => [tid, args.name]));
  const own = processOf(traceEvents, 0);
  const work = traceEvents.filter(({ ph, pid }) => ph === "X" && pid === own);
  const kernels = work.filter(({ tid }) => names.get(tid) === "compute");
  const besides: Record<string, { total: number; hidden: number }> = {};
  for (const { tid, ts, dur } of work) {
    const stream = names.get(tid) ?? "";
    if (stream === "compute") continue;
    const both = kernels.reduce((sum, k) => sum + Math.max(0, Math.min(ts + dur, k.ts + k.dur) - Math.max(ts, k.ts)), 0);
    const before = besides[stream] ?? { total: 0, hidden: 0 };
    besides[stream] = { total: before.total + dur, hidden: before.hidden + both };
  }
  return besides;
}

test("times beside kernels are those that both intervals cover", () => {
  const process = { name: "process_name", ph: "M", pid: 7, args: { name: "rank 0" } };
  const names = ["compute", "experts"].map((name, tid) => ({ name: "thread_name", ph: "M", pid: 7, tid, args: { name } }));
  const slices = [
    [0, 0, 10],
    [0, 20, 10],
    [1, 5, 20],
  ].map(([tid, ts, dur]) => ({ ph: "X", name: "x", pid: 7, tid, ts, dur }));
  expect(besideCompute(JSON.stringify({ traceEvents: [process, ...names, ...slices] }))).toEqual({ experts: { total: 20, hidden: 10 } });
});
