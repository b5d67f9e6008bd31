/** Metrics of experts equal the values that they are computed from, on any mesh; each is printed and written to the metrics file. */
import { expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { metricsLine, progressLine } from "../../src/cli/progress.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";

const E = 4;
const router = { aux_coeff: 0.1, z_coeff: 0.01 };
const jobWith = (moe: object | null, parallel: object = {}, model: object = {}, train: object = {}) =>
  jobOf({
    name: "metrics",
    model: {
      layers: 2,
      hidden: 16,
      ffn: 24,
      heads: 2,
      vocab: 256,
      seq: 8,
      ...model,
      moe: moe && { experts: E, top_k: 2, ffn: 8, router, ...moe },
    },
    parallel,
    train: { micro_batch: 1, global_batch: 4, steps: 2, precision: "fp32", init: { std: 0.3 }, optimizer: { lr: 1e-2 }, ...train },
    data: { path: "corpus.txt", order: "shuffled" },
  });

async function firstOf(job: ReturnType<typeof jobWith>, watch: readonly string[] = []) {
  const run = await openRun(compile(job).plan, { baseDir: fixture(""), watch });
  const step = await run.step({ detailed: true });
  const watched = await Promise.all(watch.map((id) => run.watched(id)));
  await run.close();
  return { step, watched };
}

const capacity = { factor: 0.75, drop: "position" };
test("expert load and dropped rows are those of the choices, the z loss is a part of the auxiliary loss", async () => {
  const layers = [0, 1];
  const ids = ["top_k_mask", "apply_capacity"].flatMap((name) => layers.map((l) => `layers.${l}.moe.${name}`));
  const { step, watched } = await firstOf(jobWith({ capacity }), ids);
  const sums = watched.map((microbatches) => {
    const counts = Array<number>(E).fill(0);
    for (const { data } of microbatches) for (const [i, x] of data.entries()) counts[i % E]! += x;
    return counts;
  });
  const total = (counts: readonly number[]) => counts.reduce((a, b) => a + b, 0);
  const [chosen, kept] = [sums.slice(0, 2), sums.slice(2)];
  // 4 sequences of 8 tokens, two experts each
  expect(chosen.map(total)).toEqual([64, 64]);
  expect(step.expert_load).toBeCloseTo(Math.max(...chosen.flat()) / 16, 6);
  expect(step.dropped_rows).toBe(128 - total(kept.map(total)));
  expect(step.dropped_rows).toBeGreaterThan(0);
  expect(step.z_loss).toBeGreaterThan(0);
  const { step: without } = await firstOf(jobWith({ capacity, router: { ...router, z_coeff: 0 } }));
  expect(step.aux_loss - step.z_loss!).toBeCloseTo(without.aux_loss, 5);
  expect(without).not.toHaveProperty("z_loss");
});

const all = { metrics: { parameter_norm: true, router_entropy: true } };
test("the norm of the weights and the entropy of routers are those of their values", async () => {
  for (const router of [{}, { score: "sigmoid" }]) {
    const ids = [0, 1].map((l) => `layers.${l}.moe.scores`);
    const run = await openRun(compile(jobWith({ router }, {}, {}, all)).plan, { baseDir: fixture(""), watch: ids });
    const step = await run.step({ detailed: true });
    const rows = (await Promise.all(ids.map((id) => run.watched(id))))
      .flat()
      .flatMap(({ data }) => Array.from({ length: data.length / E }, (_, t) => data.subarray(t * E, (t + 1) * E)));
    const entropies = rows.map((row) => {
      const sum = row.reduce((a, b) => a + b, 0);
      return row.reduce((h, x) => h - (x / sum) * Math.log(x / sum), 0);
    });
    // two layers of 32 tokens
    expect(entropies.length).toBe(64);
    expect(step.router_entropy).toBeCloseTo(entropies.reduce((a, b) => a + b, 0) / 64, 5);
    expect(step.router_entropy).toBeLessThan(Math.log(E));
    const squares = [...(await run.parameters()).values()].flatMap(({ data }) => [...data]).reduce((sum, x) => sum + x * x, 0);
    expect(step.parameter_norm! / Math.sqrt(squares)).toBeCloseTo(1, 6);
    await run.close();
  }
});

test("the norm of the weights is computed in logged steps alone, and changes no other number", async () => {
  const losses = async (detailed: (step: number) => boolean) => {
    const { plan } = compile(jobWith(null, { world: 4, tensor: 2, pipeline: 2 }, {}, { ...all, steps: 4 }));
    const run = await openRun(plan, { baseDir: fixture("") });
    const steps = [];
    for (let n = 1; n <= 4; n++) steps.push(await run.step({ detailed: detailed(n) }));
    await run.close();
    return steps;
  };
  const [none, every, second] = [await losses(() => false), await losses(() => true), await losses((n) => n % 2 === 0)];
  expect(none.map((r) => r.parameter_norm)).toEqual([undefined, undefined, undefined, undefined]);
  expect(second.map((r) => r.parameter_norm)).toEqual([undefined, every[1]!.parameter_norm, undefined, every[3]!.parameter_norm]);
  expect(every[3]!.parameter_norm).not.toBe(every[1]!.parameter_norm);
  for (const others of [every, second]) expect(others.map((r) => [r.loss, r.grad_norm])).toEqual(none.map((r) => [r.loss, r.grad_norm]));
});

test("on any mesh they are one rank's", async () => {
  const mtp = { mtp: { layers: 2 }, layers: 4 };
  const { step: want } = await firstOf(jobWith({}, {}, mtp, all));
  expect(want.mtp_loss).toBeCloseTo((want.mtp_losses![0]! + want.mtp_losses![1]!) / 2, 6);
  for (const parallel of [
    { world: 2, pipeline: 2 },
    { world: 8, pipeline: 2, tensor: 2, sequence: true, expert: 4 },
    { world: 4, context: 2, expert: 2, pipeline: 2, virtual_pipeline: 2 },
  ]) {
    const { step } = await firstOf(jobWith({}, parallel, mtp, all));
    expect(step.mtp_losses).toEqual(want.mtp_losses!.map((loss) => expect.closeTo(loss, 4)));
    for (const name of ["aux_loss", "z_loss", "mtp_loss", "expert_load", "router_entropy", "parameter_norm"] as const)
      expect(step[name], `${name} on ${JSON.stringify(parallel)}`).toBeCloseTo(want[name]!, 4);
    expect(step).not.toHaveProperty("dropped_rows");
  }
});

test("a dense model has none of them", async () => {
  const { step } = await firstOf(jobWith(null));
  expect(Object.keys(step)).toEqual(["step", "loss", "aux_loss", "grad_norm", "lr", "tokens", "seconds", "data_wait_seconds"]);
});

test("the terminal and the metrics file have each", () => {
  const report = {
    ...{ step: 3, loss: 5.25, mtp_loss: 6.5, aux_loss: 0.5, z_loss: 0.125, grad_norm: 1.5, expert_load: 1.75, dropped_rows: 12 },
    ...{ lr: 1e-4, tokens: 2048, labels: 0, seconds: 0.5, data_wait_seconds: 0.25 },
  };
  expect(progressLine(report, 3, 1)).toMatch(
    /loss 5\.2500 {2}mtp loss 6\.5000 {2}aux loss 0\.5000 {2}z loss 0\.1250 {2}grad norm 1\.500 .* expert load 1\.75 {2}dropped rows 12 {2}no labels/,
  );
  expect(JSON.parse(metricsLine(report))).toEqual(report);
});
