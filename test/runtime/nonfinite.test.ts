/** A step whose loss or gradient norm is not finite changes nothing, whatever the optimizer, the precision and the mesh; then the run stops, or goes on. */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { checkpointState } from "../../runtime/checkpoint/checkpointState.ts";
import { openCpu } from "../../runtime/cpu/backend.ts";
import { type Run, runOn, type StepResult } from "../../runtime/train/loop.ts";
import { MOST_OVERFLOWS, StepFault } from "../../runtime/train/nonfinite.ts";
import type { Plan } from "../../schemas/plan.ts";
import { rankAt } from "../../schemas/sharding.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";
import { rankc } from "../support/rankc.ts";

const biased = { experts: 4, top_k: 2, ffn: 8, router: { score: "sigmoid", expert_bias: true, bias_rate: 0.05 } };
const planOf = (train: object = {}, parallel: object = {}, moe: object | null = biased): Plan =>
  compile(
    jobOf({
      name: "nonfinite",
      model: { layers: 2, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8, moe },
      parallel,
      train: {
        ...{ micro_batch: 1, global_batch: 4, steps: 8, precision: "fp32", init: { std: 0.2 } },
        // a schedule advances by updates alone
        ...{ optimizer: { lr: 1e-2, schedule: "linear", decay_steps: 8 }, ...train },
      },
      // labels: the plan takes weights of tokens, one of which can be NaN
      data: { path: "corpus.txt", labels: "labels.i32" },
    }),
  ).plan;

/** A run whose steps of these numbers, from 0, have a loss that is not finite at one token; each step, by its number, has its own batch. */
function runWith(plan: Plan, bad: ReadonlyMap<number, number> = new Map(), steps = [0, 1, 2, 3], debugNonfinite = false): Run {
  let call = 0;
  const batch = (_: number, rows: number) => {
    const step = steps[call++]!;
    const next = random(step + 1);
    const size = rows * plan.job.model.seq;
    const ids = () => Int32Array.from({ length: size }, () => Math.floor((next() + 1) * 127.9));
    const weights = new Float32Array(size).fill(1 / size);
    const value = bad.get(step);
    if (value !== undefined) weights[size - 1] = value;
    return { ids: ids(), labels: ids(), weights };
  };
  return runOn(plan, { localRanks: openCpu(plan), batch, debugNonfinite });
}

/** All that a run remembers between two steps: weights, moments and router biases of all ranks. */
async function stateOf(run: Run, plan: Plan): Promise<Map<string, ArrayLike<number>>> {
  const state = new Map<string, ArrayLike<number>>();
  for (const p of plan.programs)
    for (let n = 0; n < plan.mesh.per_stage; n++)
      for (const { name, buffer } of checkpointState(p)) {
        const rank = rankAt(plan.mesh, p.stage, n);
        state.set(`${name} of rank ${rank}`, (await run.read(rank, buffer)).slice());
      }
  return state;
}
async function stepsOf(run: Run, count: number): Promise<StepResult[]> {
  const steps: StepResult[] = [];
  while (steps.length < count) steps.push(await run.step());
  return steps;
}

const many = { world: 8, pipeline: 2, tensor: 2, sequence: true, expert: 2, distributed_optimizer: true };
const quantile = { experts: 4, top_k: 2, ffn: 8, router: { balance: "quantile", aux_coeff: 0 } };
test.each([
  ["adamw, one rank", planOf(), Number.NaN],
  ["adamw, a mesh of stages", planOf({}, many), Number.NaN],
  ["momentum", planOf({ optimizer: { type: "sgd", lr: 1e-2 } }), Number.POSITIVE_INFINITY],
  ["muon", planOf({ optimizer: { type: "muon", lr: 1e-2 } }, many), Number.NaN],
  ["quantiles", planOf({ optimizer: { type: "adam", lr: 1e-2 } }, {}, quantile), Number.NaN],
  ["bf16", planOf({ precision: "bf16" }), Number.NaN],
  ["fp16", planOf({ precision: "fp16", loss_scale: 16 }), Number.NaN],
])("skip, %s: the run is the one that never had the step", async (_, plan, value) => {
  const skipping = { ...plan, job: { ...plan.job, train: { ...plan.job.train, on_nonfinite: "skip" as const } } };
  const [got, want] = [runWith(skipping, new Map([[1, value]])), runWith(skipping, new Map(), [0, 2, 3, 4])];
  const [first, bad, ...rest] = await stepsOf(got, 4);
  const steps = await stepsOf(want, 3);
  expect(bad).toMatchObject({ step: 2, skipped: true, nonfinite: expect.stringMatching(/^loss (NaN|Infinity)$/) });
  expect([first!.skipped, ...rest.map((s) => s.skipped)]).toEqual([false, false, false]);
  const numbers = ({ loss, grad_norm, lr }: StepResult) => [loss, grad_norm, lr];
  expect([first!, ...rest].map(numbers)).toEqual(steps.map(numbers));
  expect(await stateOf(got, plan)).toEqual(await stateOf(want, plan));
  expect(got.progress()).toMatchObject({ steps: 4, updates: 3, trained: 12, read: 16 });
});

test("stop: the error names the step and the value, and the state is unchanged", async () => {
  for (const plan of [planOf(), planOf({}, many)]) {
    const run = runWith(plan, new Map([[1, Number.NaN]]));
    await run.step();
    const [state, progress] = [await stateOf(run, plan), run.progress()];
    const fault = await run.step().catch((error: unknown) => error);
    expect(fault).toBeInstanceOf(StepFault);
    expect(fault).toMatchObject({ exit: 2, message: "step 2: the loss is NaN; the step changed no weights, and the run ends" });
    expect(await stateOf(run, plan)).toEqual(state);
    expect(run.progress()).toEqual(progress);
  }
});

test("a gradient norm that overflows is not finite either, with a loss that is", async () => {
  // logits of 1e25 have gradients whose squares f32 does not hold
  const plan = planOf({ on_nonfinite: "skip", optimizer: { type: "sgd", lr: 1e-2 } }, {}, null);
  const run = runWith(plan, new Map([[0, 1e30]]));
  const [step] = await stepsOf(run, 1);
  expect(step).toMatchObject({ skipped: true, nonfinite: "gradient norm Infinity" });
  expect(Number.isFinite(step!.loss)).toBe(true);
});

test("debugNonfinite names the first instruction that made such a value from finite operands", async () => {
  for (const [parallel, rank] of [
    [{}, "rank 0"],
    [{ world: 2, pipeline: 2 }, "rank 1"],
  ] as const) {
    const plan = planOf({ optimizer: { type: "sgd", lr: 1e-2, clip: 0 } }, parallel, null);
    // the weight is finite, its product with the loss is not
    const run = runWith(plan, new Map([[1, 3e38]]), undefined, true);
    await run.step();
    const fault = await run.step().catch((error: unknown) => error);
    expect((fault as Error).message).toContain(
      `the first value that is not finite is Infinity in loss, by loss (weighted_sum) of ${rank}, F3, from operands that are`,
    );
  }
  // what the step begins with is no instruction's work
  const run = runWith(planOf(), new Map([[0, Number.NaN]]), undefined, true);
  await expect(run.step()).rejects.toThrow(
    /NaN in loss, by loss \(weighted_sum\).*which read weights: that was not finite when the step began/s,
  );
});

test(`fp16: after ${MOST_OVERFLOWS} overflows in a row at the least scale the run ends, and no router bias has moved`, async () => {
  const adaptive = { initial: 2 ** 41, min: 2 ** 40, hysteresis: 1 };
  for (const [loss_scale, last] of [
    [2 ** 40, MOST_OVERFLOWS],
    // the first overflow shrinks it
    [adaptive, MOST_OVERFLOWS + 1],
  ] as const) {
    const plan = planOf({ precision: "fp16", loss_scale });
    const run = runWith(plan, new Map(), [0, 1, 2, 3, 4, 5, 6]);
    const state = await stateOf(run, plan);
    for (const step of await stepsOf(run, last - 1)) expect(step).toMatchObject({ skipped: true });
    await expect(run.step()).rejects.toThrow(
      `step ${last}: gradients overflowed in ${MOST_OVERFLOWS} steps in a row at the loss scale ${2 ** 40}, the smallest`,
    );
    expect(await stateOf(run, plan)).toEqual(state);
  }
});

test("fp16: a loss that is not finite stops the run at once, and is no overflow of the scale", async () => {
  const run = runWith(planOf({ precision: "fp16", loss_scale: { initial: 256 } }), new Map([[0, Number.NaN]]));
  await expect(run.step()).rejects.toThrow("step 1: the loss is NaN");
  expect(run.progress().loss_scale?.scale).toBe(256);
});

test("the command line ends with exit 2 and saves no checkpoint of the step; skip goes on and counts", { timeout: 60_000 }, async () => {
  const place = mkdtempSync(join(tmpdir(), "rankc-nonfinite-"));
  try {
    const path = join(place, "job.yaml");
    const model = { layers: 1, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8 };
    const job = {
      ...{ name: "diverging", model, data: { path: fixture("corpus.txt") }, cluster: { device: "cpu" } },
      train: { steps: 3, global_batch: 2, precision: "fp32", optimizer: { lr: 1e30 } },
    };
    writeFileSync(path, JSON.stringify(job));
    const saved = join(place, "saved");
    const stopped = await rankc("run", path, "--save", saved, "--save-every", "1");
    expect([stopped.exit, stopped.err]).toEqual([2, expect.stringContaining("step 2: the loss is NaN")]);
    expect(readdirSync(saved)).toEqual(["step-00000001"]);
    const skipped = await rankc("run", path, "--set", "train.on_nonfinite=skip", "--format", "json");
    expect([skipped.exit, JSON.parse(skipped.out)]).toEqual([0, expect.objectContaining({ steps: 3, skipped: 2 })]);
    expect(skipped.err).toMatch(/step 2\/3 {2}loss NaN.*skipped: loss NaN/);
  } finally {
    rmSync(place, { recursive: true, force: true });
  }
});
