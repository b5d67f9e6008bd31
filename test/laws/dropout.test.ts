/**
 * Dropout and jitter: the share of elements that are left out, which are random and independent; backward leaves out the same; and the
 * choice is a function of the job's seed, the place in the model and the element alone.
 */
import { describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { attention, attentionGrad } from "../../src/ops/attention.ts";
import { attentionDropout, attentionDropoutGrad } from "../../src/ops/attentionDropout.ts";
import { dropout, jitter, siteOf } from "../../src/ops/dropout.ts";
import { distance, fixture, jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";
import { slopeErrors } from "../support/slopes.ts";
import { full, isFull } from "../support/tiers.ts";

const place = { start: () => 0, rows: new Int32Array(1) };
const [B, S, D] = [4, 64, 256];
/** What an op of ones gives: which elements are kept, and what they become. */
function ofOnes(op: typeof dropout | typeof jitter, attrs: object, seed = 1, name = "a", first = 0): Float32Array {
  const y = new Float32Array(B * S * D);
  const sample = Float32Array.from({ length: B }, (_, b) => first + b);
  op.cpu({ x: new Float32Array(B * S * D).fill(1), sample, y }, { B, S, D, chunk: 0, ranks: 1, ...attrs, ...siteOf(seed, name) }, place);
  return y;
}
const correlation = (a: Float32Array, b: Float32Array): number => {
  const mean = (x: Float32Array) => x.reduce((sum, v) => sum + v, 0) / x.length;
  const [ma, mb] = [mean(a), mean(b)];
  const sums = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    sums[0]! += (a[i]! - ma) * (b[i]! - mb);
    sums[1]! += (a[i]! - ma) ** 2;
    sums[2]! += (b[i]! - mb) ** 2;
  }
  return sums[0]! / Math.sqrt(sums[1]! * sums[2]!);
};

describe("statistics", () => {
  // 65,536 draws: a share is off by 0.002 at one standard deviation
  test.each([0.1, 0.5, 0.9])("a fraction %f of the elements is dropped, and the others are scaled to keep the mean", (drop) => {
    const y = ofOnes(dropout, { drop });
    const kept = y.filter((v) => v !== 0);
    expect(Math.abs(1 - kept.length / y.length - drop)).toBeLessThan(0.01);
    expect(new Set(kept)).toEqual(new Set([Math.fround(1 / (1 - drop))]));
  });

  test("jitter is uniform around 1", () => {
    const y = ofOnes(jitter, { eps: 0.25 });
    expect(Math.min(...y)).toBeGreaterThanOrEqual(0.75);
    expect(Math.max(...y)).toBeLessThan(1.25);
    const bins = Array.from({ length: 8 }, (_, i) => y.filter((v) => Math.floor((v - 0.75) * 16) === i).length / y.length);
    for (const share of bins) expect(Math.abs(share - 1 / 8)).toBeLessThan(0.01);
  });

  test("neighbouring channels and tokens, sequences, sites of the model and seeds are independent", () => {
    const y = ofOnes(dropout, { drop: 0.3 });
    const others = {
      channel: y.slice(1),
      "four channels on": y.slice(4),
      token: y.slice(D),
      "sequence of the batch": y.slice(S * D),
      "later sequences": ofOnes(dropout, { drop: 0.3 }, 1, "a", 100),
      place: ofOnes(dropout, { drop: 0.3 }, 1, "b"),
      seed: ofOnes(dropout, { drop: 0.3 }, 2),
    };
    for (const [what, other] of Object.entries(others)) {
      const n = Math.min(y.length, other.length);
      expect(Math.abs(correlation(y.subarray(0, n), other.subarray(0, n))), what).toBeLessThan(0.02);
    }
    expect(ofOnes(dropout, { drop: 0.3 })).toEqual(y);
  });
});

test("attention with dropout 0 is attention; the gradient drops the same weights", () => {
  const d = { B: 2, S: 12, U: 12, G: 2, M: 2, C: 6, W: 5, scale: 0.4, chunk: 0, ranks: 1 };
  const next = random(3);
  const draw = (n: number) => Float32Array.from({ length: n }, () => 2 * next());
  const [q, k, v, dy] = [2 * 12 * 24, 2 * 12 * 12, 2 * 12 * 10, 2 * 12 * 20].map(draw) as [
    Float32Array,
    Float32Array,
    Float32Array,
    Float32Array,
  ];
  const sample = Float32Array.of(7, 8);
  const site = siteOf(1, "attn");
  const made = () => ({ o: new Float32Array(2 * 12 * 20), lse: new Float32Array(2 * 12 * 4) });
  const grads = () => ({ dq: new Float32Array(q.length), dk: new Float32Array(k.length), dv: new Float32Array(v.length) });
  const [plain, none, some] = [made(), made(), made()];
  attention.cpu({ q, k, v, ...plain }, d, place);
  attentionDropout.cpu({ q, k, v, sample, ...none }, { ...d, drop: 0, ...site }, place);
  attentionDropout.cpu({ q, k, v, sample, ...some }, { ...d, drop: 0.4, ...site }, place);
  expect(none).toEqual(plain);
  expect(some.lse).toEqual(plain.lse);
  expect(distance(some.o, plain.o)).toBeGreaterThan(0.1);
  const [ofPlain, ofNone, ofSome] = [grads(), grads(), grads()];
  attentionGrad.cpu({ q, k, v, dy, ...plain, ...ofPlain }, d, place);
  attentionDropoutGrad.cpu({ q, k, v, sample, dy, ...none, ...ofNone }, { ...d, drop: 0, ...site }, place);
  expect(ofNone).toEqual(ofPlain);
  // values: o is linear in them, so that ⟨dv, v⟩ = ⟨dy, o⟩ with the same weights dropped
  attentionDropoutGrad.cpu({ q, k, v, sample, dy, ...some, ...ofSome }, { ...d, drop: 0.4, ...site }, place);
  const dot = (a: Float32Array, b: Float32Array) => a.reduce((sum, x, i) => sum + x * b[i]!, 0);
  expect(dot(ofSome.dv, v)).toBeCloseTo(dot(dy, some.o), 3);
});

// a balancing loss is of each microbatch, and so would depend on how large these are
const moe = { experts: 4, top_k: 2, ffn: 16, router: { balance: "none", z_coeff: 0.05, jitter: 0.1 } };
const jobWith = (model: object, parallel: object = {}, train: object = {}): Job =>
  jobOf({
    name: "random",
    model: { layers: 2, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, vocab: 256, seq: 16, ...model },
    parallel,
    train: {
      micro_batch: 1,
      global_batch: 8,
      steps: 3,
      precision: "fp32",
      init: { std: 0.2 },
      optimizer: { lr: 1e-2, eps: 1e-6 },
      ...train,
    },
    data: { path: "corpus.txt", order: "shuffled" },
  });
const some = { dropout: { attention: 0.2, hidden: 0.1 }, moe };

async function losses(job: Job): Promise<number[]> {
  const run = await openRun(compile(job).plan, { baseDir: fixture("") });
  const all = [(await run.step()).loss, (await run.step()).loss, (await run.step()).loss];
  await run.close();
  return all;
}
const near = (got: readonly number[], want: readonly number[]): void =>
  got.forEach((loss, i) => void expect(Math.abs(loss - want[i]!), `loss of step ${i}`).toBeLessThan(1e-4));

test("with dropout, a model's gradient is its measured slope", full, async () => {
  const errors = await slopeErrors(jobWith(some, {}, { global_batch: 2 }), ({ loss, aux_loss }) => loss + aux_loss);
  expect(errors.size).toBeGreaterThan(15);
  for (const [name, error] of errors) expect(error, name).toBeLessThan(5e-3);
});

test("losses depend on the seed; not on mesh, microbatches, ring or recomputation", async () => {
  const want = await losses(jobWith(some));
  const kinds: readonly (readonly [object, object])[] = [
    [{}, { micro_batch: 4 }],
    [{}, { recompute: { mode: "full" } }],
    [{}, { recompute: { mode: "selective", modules: ["core_attn", "moe", "layernorm"] } }],
    [{ world: 4, tensor: 2, sequence: true, expert: 4 }, {}],
    [{ world: 4, context: 4, context_method: "ring", expert: 2 }, {}],
    [{ world: 4, context: 4, context_method: "all_gather" }, {}],
    [{ world: 8, pipeline: 2, tensor: 2, sequence: true, expert: 2, distributed_optimizer: true }, {}],
    [{ world: 2, pipeline: 2, virtual_pipeline: 1, schedule: "zero_bubble" }, { recompute: { mode: "full" } }],
  ];
  for (const [parallel, train] of isFull ? kinds : [2, 4, 6].map((i) => kinds[i]!))
    near(await losses(jobWith(some, parallel, train)), want);
  // gradients of the embedding's dropout and of tensor parallelism without a cut sequence
  const dense = { dropout: { attention: 0.2, hidden: 0.3 } };
  near(await losses(jobWith(dense, { world: 2, tensor: 2, sequence: false })), await losses(jobWith(dense)));
  const other = await losses(jobWith(some, {}, { seed: 99, init: { std: 0.2 } }));
  expect(other[0]).not.toBeCloseTo(want[0]!, 3);
  expect(await losses(jobWith({ moe: { ...moe, router: { ...moe.router, jitter: null } } }))).not.toEqual(want);
});

test("a plan without randomness has no sequence numbers as input", () => {
  for (const [model, asked] of [
    [{ moe: { ...moe, router: { ...moe.router, jitter: null } } }, false],
    [{ dropout: { attention: 0, hidden: 0 } }, false],
    [some, true],
  ] as const)
    expect(compile(jobWith(model)).plan.programs.some((p) => p.inputs.some(({ source }) => source === "sample"))).toBe(asked);
});
