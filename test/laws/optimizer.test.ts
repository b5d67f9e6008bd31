/**
 * Updates of parameters: in each step every optimizer equals plain loops over the gradients and rates of the run, on one rank and where
 * ranks hold shards of the state. Gradients of the microbatches of a step are summed in f32, in any precision of the model.
 */
import { describe, expect, test } from "vitest";
import { openCpu } from "../../runtime/cpu/backend.ts";
import { weightDecay } from "../../runtime/train/learningRate.ts";
import { runOn, type Tensor } from "../../runtime/train/loop.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { compile } from "../../src/compile.ts";
import { ops } from "../../src/ops/index.ts";
import { rounded } from "../support/contract.ts";
import { distance, fixture, jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";
import { byTier, isFull } from "../support/tiers.ts";

const jobWith = (optimizer: object, parallel: object = {}, train: object = {}): Job =>
  jobOf({
    name: "moves",
    model: { layers: 2, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, vocab: 256, seq: 16, qkv_bias: true },
    parallel,
    train: { global_batch: 4, steps: 5, precision: "fp32", init: { std: 0.2 }, optimizer: { lr: 1e-2, ...optimizer }, ...train },
    data: { path: "corpus.txt", order: "shuffled" },
  });

/** One parameter and its state, in doubles. */
interface State {
  readonly w: Float64Array;
  readonly m: Float64Array;
  readonly v: Float64Array;
}
const stateOf = (t: Tensor): State => ({
  w: Float64Array.from(t.data),
  m: new Float64Array(t.data.length),
  v: new Float64Array(t.data.length),
});

/**
 * Singular values near 1, as Jordan's article writes it for any shape: X (a + b·G + c·G²) with G = XᵀX, from X of norm 1. The op works on
 * the shorter side and transposes; here nothing is transposed.
 */
function orthogonal(x: Float64Array, rows: number, columns: number, by: "simple" | "quintic"): Float64Array {
  const product = (p: Float64Array, q: Float64Array, n: number, depth: number, m: number, at: (i: number, k: number) => number) =>
    Float64Array.from({ length: n * m }, (_, ij) => {
      let sum = 0;
      for (let k = 0; k < depth; k++) sum += p[at(Math.floor(ij / m), k)]! * q[k * m + (ij % m)]!;
      return sum;
    });
  const norm = Math.hypot(...x);
  let y = x.map((v) => v / norm);
  for (const [a, b, c] of by === "simple" ? Array<readonly [number, number, number]>(5).fill([3.4445, -4.775, 2.0315]) : quintic) {
    const gram = product(y, y, columns, rows, columns, (a, k) => k * columns + a);
    const squared = product(gram, gram, columns, columns, columns, (a, k) => a * columns + k);
    const factor = gram.map((v, at) => b * v + c * squared[at]! + (at % (columns + 1) === 0 ? a : 0));
    y = product(y, factor, rows, columns, columns, (a, k) => a * columns + k);
  }
  return y;
}
/** The coefficients of each iteration, as the speed run of NanoGPT has them (modded-nanogpt, train_gpt_medium.py). */
const quintic = [
  [4.0848, -6.8946, 2.927],
  [3.9505, -6.3029, 2.6377],
  [3.7418, -5.5913, 2.3037],
  [2.8769, -3.1427, 1.2046],
  [2.8366, -3.0525, 1.2012],
] as const;

/** Muon on one matrix, or on the matrix of each expert: momentum, Nesterov's step, orthogonal form, decay of the weights. */
function moveMatrix(
  { w, m }: State,
  g: Float32Array,
  shape: readonly number[],
  muon: NonNullable<Job["train"]["optimizer"]["muon"]>,
  scalars: { clip: number; lr: number; decay: number },
): void {
  const [rows, columns] = shape.slice(-2) as [number, number];
  const scale = { spectral: Math.max(rows, columns), unit_rms_norm: columns / rows, shape_scaling: Math.max(1, columns / rows) };
  const factor = muon.extra_scale_factor * scale[muon.scale_mode] ** 0.5;
  for (let first = 0; first < w.length; first += rows * columns) {
    const ahead = new Float64Array(rows * columns);
    for (let i = 0; i < ahead.length; i++) {
      const gradient = g[first + i]! * scalars.clip;
      const next = muon.momentum * m[first + i]! + (1 - muon.momentum) * gradient;
      m[first + i] = next;
      ahead[i] = muon.nesterov ? muon.momentum * next + (1 - muon.momentum) * gradient : next;
    }
    for (const [i, u] of orthogonal(ahead, rows, columns, muon.coefficients).entries())
      w[first + i] = w[first + i]! - scalars.lr * scalars.decay * w[first + i]! - scalars.lr * factor * u;
  }
}

/** As the papers write them, and torch.optim does. */
function move(
  { w, m, v }: State,
  g: Float32Array,
  how: Job["train"]["optimizer"],
  scalars: { clip: number; lr: number; decay: number; step: number },
): void {
  const decoupled = how.type === "adamw" || how.type === "muon";
  const [b1, b2] = how.betas as [number, number];
  for (let i = 0; i < w.length; i++) {
    const gradient = g[i]! * scalars.clip + (decoupled ? 0 : scalars.decay * w[i]!);
    if (how.type === "sgd") {
      m[i] = how.momentum * m[i]! + gradient;
      w[i]! -= scalars.lr * m[i]!;
      continue;
    }
    if (decoupled) w[i]! -= scalars.lr * scalars.decay * w[i]!;
    m[i] = b1 * m[i]! + (1 - b1) * gradient;
    v[i] = b2 * v[i]! + (1 - b2) * gradient ** 2;
    w[i]! -= (scalars.lr * (m[i]! / (1 - b1 ** scalars.step))) / (Math.sqrt(v[i]! / (1 - b2 ** scalars.step)) + how.eps);
  }
}

const rising = { weight_decay_schedule: "linear", weight_decay_start: 0, weight_decay_end: 0.5 };
const methods: Readonly<Record<string, object>> = {
  adamw: { type: "adamw" },
  "adamw, a weight decay that rises": { type: "adamw", ...rising },
  adam: { type: "adam", weight_decay: 0.3 },
  "adam, a weight decay that rises, no clipping": { type: "adam", ...rising, clip: 0 },
  "sgd with momentum": { type: "sgd", lr: 0.1, weight_decay: 0.3, clip: 0.5 },
  "sgd without": { type: "sgd", lr: 0.3, momentum: 0, weight_decay: 0.2 },
  "sgd, a weight decay that rises by a cosine": { type: "sgd", lr: 0.05, ...rising, weight_decay_schedule: "cosine" },
  "sgd without momentum, a weight decay that rises": { type: "sgd", lr: 0.1, momentum: 0, ...rising },
};
const muons: Readonly<Record<string, object>> = {
  muon: { type: "muon" },
  "muon without Nesterov, scaled by the ratio of sides": {
    type: "muon",
    muon: { nesterov: false, momentum: 0.8, scale_mode: "unit_rms_norm" },
  },
  "muon with other coefficients in each iteration": { type: "muon", muon: { coefficients: "quintic" } },
  "muon, a weight decay that rises": { type: "muon", muon: { scale_mode: "shape_scaling", extra_scale_factor: 1 }, ...rising },
};
const meshes = { "one rank": {}, "shares over data, tensor and stages": { world: 8, tensor: 2, pipeline: 2, distributed_optimizer: true } };

/** Steps: the learning rate grows in the first two, and decay and moments of several are seen in the third. */
const STEPS = isFull ? 5 : 3;
/** Of so many methods, those that run in the fast tier: every fourth, others on each mesh, and one of Muon. */
const fastMethods = { "one rank": 0, "shares over data, tensor and stages": 3 } as const;

describe.each(Object.entries(meshes).map(([mesh, parallel]) => ({ mesh: mesh as keyof typeof meshes, parallel })))(
  "on $mesh",
  ({ mesh, parallel }) => {
    for (const { options, rows } of byTier(
      [...Object.entries(methods), ...Object.entries(muons)],
      ([name], i) => i % 4 === fastMethods[mesh] && name !== "muon",
    ))
      test.each(rows)("%s", options, async (_, optimizer) => {
        const job = jobWith({ schedule: "linear", warmup_steps: 2, ...optimizer }, parallel);
        const { train } = job;
        const run = await openRun(compile(job).plan, { baseDir: fixture("") });
        const own = new Map([...(await run.parameters())].map(([name, t]) => [name, stateOf(t)]));
        for (let step = 1; step <= STEPS; step++) {
          const { grad_norm, lr } = await run.step();
          const clip = train.optimizer.clip > 0 ? Math.min(1, train.optimizer.clip / (grad_norm + 1e-6)) : 1;
          if (step === 1 && train.optimizer.clip > 0) expect(clip).toBeLessThan(1);
          const decay = weightDecay(train, (step - 1) * train.global_batch);
          for (const [name, { shape, data }] of await run.gradients())
            if (train.optimizer.muon && shape.length > 1 && name !== "embed" && name !== "head")
              moveMatrix(own.get(name)!, data, shape, train.optimizer.muon, { clip, lr, decay });
            else move(own.get(name)!, data, train.optimizer, { clip, lr, step, decay: shape.length > 1 ? decay : 0 });
        }
        const have = await run.parameters();
        await run.close();
        expect([...own.keys()].sort()).toEqual([...have.keys()].sort());
        // the state is kept in f32: 2^-24 of what is added, some times over
        for (const [name, { w }] of own) expect(distance(have.get(name)!.data, w), name).toBeLessThan(1e-6);
      });
  },
);

test.each([
  ["sgd_momentum", { momentum: 0.9, decay: 0.1 }, [0.89, 0.6821]],
  ["sgd", { decay: 0.1 }, [0.89, 0.7811]],
  // where the gradient is one number, a first step of Adam is lr, whatever that is
  ["adam", { beta1: 0.9, beta2: 0.95, eps: 0, decay: 0.1 }, [0.9]],
  ["adamw", { beta1: 0.9, beta2: 0.95, eps: 0, decay: 0.1 }, [0.89]],
] as const)("%s from 1 down a slope of 1, by 0.1", (name, attrs, want) => {
  const t = { g: [1], scale: [1], lr: [0.1], step: [1], w: [1], m: [0], v: [0] };
  const arrays = Object.fromEntries(Object.entries(t).map(([n, x]) => [n, Float32Array.from(x)]));
  for (const w of want) {
    ops[name].cpu(arrays, attrs, { start: () => 0, rows: new Int32Array(1) });
    expect(arrays.w![0]).toBeCloseTo(w, 6);
  }
});

test("bf16 loses no small steps: updates change f32 weights, and the model has these rounded", async () => {
  const job = jobWith({ type: "sgd", lr: 1e-5, momentum: 0, clip: 0, weight_decay: 0 }, {}, { precision: "bf16" });
  const run = await openRun(compile(job).plan, { baseDir: fixture("") });
  const before = await run.parameters();
  await run.step();
  const [gradients, after] = [await run.gradients(), await run.parameters()];
  await run.close();
  let [moved, unseen] = [0, 0];
  for (const [name, { data }] of gradients) {
    const [w0, w1] = [before.get(name)!.data, after.get(name)!.data];
    // of weights up to 1 the last place is 2^-24
    for (const [i, g] of data.entries()) expect(Math.abs(w1[i]! - (w0[i]! - 1e-5 * g)), name).toBeLessThan(2 ** -23);
    const [seen0, seen1] = [rounded(w0, "bf16"), rounded(w1, "bf16")];
    for (let i = 0; i < data.length; i++) {
      moved += Number(w0[i] !== w1[i]);
      unseen += Number(w0[i] !== w1[i] && seen0[i] === seen1[i]);
    }
  }
  expect(unseen / moved).toBeGreaterThan(0.9);
});

for (const { options, rows } of byTier(["bf16", "fp16"] as const, (precision) => precision === "bf16"))
  test.each(rows)(
    "in %s the gradient of many microbatches is the mean of theirs, to the last places of f32",
    options,
    async (precision) => {
      const SEQUENCES = isFull ? 16 : 8;
      const seq = 16;
      const next = random(3);
      const text = Int32Array.from({ length: SEQUENCES * (seq + 1) }, () => Math.floor((next() + 1) * 127.9));
      const rows = (first: number, n: number, from: number) =>
        Int32Array.from({ length: n * seq }, (_, i) => text[(first + Math.floor(i / seq)) * (seq + 1) + (i % seq) + from]!);
      const planFor = (global_batch: number): Plan =>
        compile(jobWith({}, {}, { precision, global_batch, ...(precision === "fp16" ? { loss_scale: 1024 * global_batch } : {}) })).plan;
      const ofOne = planFor(1);
      /** Of sequences from `first` on, as many as the plan's batch. */
      async function gradients(plan: Plan, first: number) {
        const run = runOn(plan, {
          localRanks: openCpu(plan),
          batch: (at, n) => ({ ids: rows(first + (at % SEQUENCES), n, 0), labels: rows(first + (at % SEQUENCES), n, 1) }),
        });
        await run.step();
        return run.gradients();
      }
      const all = await gradients(planFor(SEQUENCES), 0);
      const each: Map<string, Tensor>[] = [];
      for (let i = 0; i < SEQUENCES; i++) each.push(await gradients(ofOne, i));
      for (const [name, { data }] of all) {
        const mean = data.map((_, i) => each.reduce((sum, g) => sum + g.get(name)!.data[i]!, 0) / SEQUENCES);
        // added up in bf16 it would be off by 2^-9 a time
        expect(distance(data, mean), name).toBeLessThan(1e-6);
      }
    },
  );
