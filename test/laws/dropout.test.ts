/**
 * Dropout and jitter: the share of elements that are left out, which are random and independent; backward leaves out the same; and the
 * choice is a function of the job's seed, the place in the model and the element alone.
 */
import { describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { attention, attentionGrad } from "../../src/ops/attention.ts";
import { attentionDropout, attentionDropoutGrad, keptOf, weightDropsOf } from "../../src/ops/attentionDropout.ts";
import { dropout, jitter, siteOf } from "../../src/ops/dropout.ts";
import { philox } from "../../src/ops/philox.ts";
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

describe("weights of attention", () => {
  const [S, U, M] = [128, 256, 2];
  const at = { S: 0, U: 0, G: 0 };
  /** The factors of all weights of two heads of one sequence: [query, head, key]. */
  function factors(
    drop: number,
    { seed = 1, name = "a", sequence = 5, starts = at }: Record<string, unknown> & Partial<Choice> = {},
  ): Float32Array {
    const sizes = { B: 1, S, U, G: 1, M, C: 1, W: 1, scale: 1, chunk: 0, ranks: 1, drop, ...siteOf(seed, name) };
    const kept = keptOf(Float32Array.of(sequence), sizes, { ...place, start: (dim: string) => starts[dim as keyof typeof starts] });
    return Float32Array.from({ length: S * M * U }, (_, i) => kept(Math.floor(i / U), i % U));
  }
  interface Choice {
    readonly seed: number;
    readonly name: string;
    readonly sequence: number;
    readonly starts: typeof at;
  }

  // 65,536 draws: a share is off by 0.002 at one standard deviation
  test.each([0.1, 0.5, 0.9])("a fraction %f of the weights is dropped, and the others are scaled to keep the mean", (drop) => {
    const all = factors(drop);
    const { threshold, factor } = weightDropsOf(drop);
    const kept = all.filter((f) => f !== 0);
    expect(Math.abs(1 - kept.length / all.length - drop)).toBeLessThan(0.01);
    expect(new Set(kept)).toEqual(new Set([Math.fround(factor)]));
    // exactly for the rounded probability, which is at most half of 2^-15 off
    expect(factor * (1 - threshold / 2 ** 15)).toBeCloseTo(1, 12);
    expect(Math.abs(threshold / 2 ** 15 - drop)).toBeLessThanOrEqual(2 ** -16);
  });

  test("weights that share a call of Philox are independent, and so are neighbours, heads, sequences, sites and seeds", () => {
    const all = factors(0.3);
    const row = M * U;
    const others = {
      "next key, the other half of a word": all.slice(1),
      "8 keys on, another word": all.slice(8),
      "9 keys on, the other half of another word": all.slice(9),
      "2 keys on, another call": all.slice(2),
      "16 keys on, another block": all.slice(16),
      "8 queries on, another word": all.slice(8 * row),
      "8 queries and 8 keys on": all.slice(8 * row + 8),
      "8 queries and a key on": all.slice(8 * row + 1),
      "next query": all.slice(row),
      "16 queries on": all.slice(16 * row),
      "next head": all.slice(U),
      "next sequence": factors(0.3, { sequence: 6 }),
      site: factors(0.3, { name: "b" }),
      seed: factors(0.3, { seed: 2 }),
    };
    for (const [what, other] of Object.entries(others)) {
      const n = Math.min(all.length, other.length);
      expect(Math.abs(correlation(all.subarray(0, n), other.subarray(0, n))), what).toBeLessThan(0.02);
    }
    expect(factors(0.3)).toEqual(all);
  });

  test("a shard draws what the whole does at its positions, wherever it begins", () => {
    const all = factors(0.3);
    for (const starts of [
      { S: 16, U: 32, G: 0 },
      { S: 5, U: 11, G: 0 },
    ]) {
      const shard = factors(0.3, { starts });
      for (const [query, head, key] of [
        [0, 0, 0],
        [7, 1, 3],
        [40, 0, 90],
        [99, 1, 200],
      ] as const)
        expect(shard[(query * M + head) * U + key]).toBe(all[((query + starts.S) * M + head) * U + key + starts.U]);
    }
  });

  test("one call gives the eight weights of two queries and four keys", () => {
    const [key0, key1] = Object.values(siteOf(1, "a")) as [number, number];
    const { threshold } = weightDropsOf(0.3);
    const all = factors(0.3);
    const words = new Uint32Array(4);
    // queries 37 and 45, keys 84, 85, 92 and 93 of head 1
    philox(words, 5, 8 * 2 + 5, 1, 4 * 5 + 2, key0, key1);
    for (const [i, word] of words.entries())
      for (const half of [0, 1]) {
        const dropped = ((word >>> (16 * half)) & 0x7fff) < threshold;
        expect(all[((37 + 8 * (i % 2)) * M + 1) * U + 84 + 8 * Math.floor(i / 2) + half] === 0, `half ${half} of word ${i}`).toBe(dropped);
      }
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
