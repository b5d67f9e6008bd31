/** Initial weights are normal, and a function of seed, name and global index alone: the same in every shard, type and order. */
import fc from "fast-check";
import { expect, test } from "vitest";
import { shardBox } from "../../runtime/shards.ts";
import { encoded, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { drawElements, normalTable } from "../../src/ops/normalDraw.ts";
import { keyOf } from "../../src/ops/philox.ts";
import { jobOf } from "../support/job.ts";

const small = { layers: 1, hidden: 32, ffn: 64, heads: 4, vocab: 256, seq: 16 };
const rest = { name: "initial", parallel: { world: 1 }, data: { path: "corpus.txt", tokenizer: "bytes" } };
const step = { micro_batch: 1, global_batch: 1, steps: 1, precision: "fp32", optimizer: { lr: 1e-2 } };
const unit = normalTable(1, "f32");
function draw(length: number, seed: number, name: string, start = 0): Float32Array {
  const out = new Int32Array(length);
  drawElements(out, unit, keyOf(seed, name), start);
  return new Float32Array(out.buffer);
}
const mean = (values: Float32Array, f: (x: number) => number): number => values.reduce((sum, x) => sum + f(x), 0) / values.length;
/** The normal distribution function: 1/2 plus the density times x + x³/3 + x⁵/(3·5) + … */
function below(x: number): number {
  let [term, sum] = [x, x];
  for (let n = 3; Math.abs(term) > 1e-18; n += 2) sum += term *= (x * x) / n;
  return 0.5 + (Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI)) * sum;
}

test("the table has the normal quantiles above the median, rounded to f32", () => {
  new Float32Array(unit.buffer).forEach((z, j) => {
    const wanted = 0.5 + (j + 0.5) / 2 ** 16;
    // rounding moves z by at most 2^-25 of it
    const density = Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI);
    expect(Math.abs(below(z) - wanted)).toBeLessThan(z * density * 2 ** -24 + 1e-15);
  });
});

test("the numbers are normal: moments, tails and the largest distance of 400,000 from the distribution", () => {
  const n = 400_000;
  const a = draw(n, 1234, "embed");
  // moments 1 to 4, each within five standard errors
  [0, 1, 0, 3].forEach((moment, i) => {
    const spread = Math.sqrt([1, 2, 15, 96][i]! / n);
    expect(Math.abs(mean(a, (x) => x ** (i + 1)) - moment)).toBeLessThan(5 * spread);
  });
  for (const z of [1, 2, 3, 4]) {
    const p = 2 * (1 - below(z));
    expect(Math.abs(mean(a, (x) => Number(Math.abs(x) > z)) - p)).toBeLessThan(5 * Math.sqrt(p / n));
  }
  // Kolmogorov and Smirnov: 1.95 / √n is exceeded once in a thousand
  const sorted = a.slice().sort();
  expect(sorted.reduce((worst, x, i) => Math.max(worst, Math.abs(below(x) - (i + 0.5) / n)), 0)).toBeLessThan(1.95 / Math.sqrt(n));
});

test("no two names, seeds or distances between elements are correlated", () => {
  const n = 100_000;
  const a = draw(n + 300, 1234, "embed");
  const correlation = (b: Float32Array) => Math.abs(b.reduce((sum, x, i) => sum + x * a[i]!, 0) / n) * Math.sqrt(n);
  const others = Array.from({ length: 50 }, (_, i) => draw(n, 1234 + (i % 2), `layers.${i}.wq`));
  // a key that differs in one bit of either word
  for (const word of [0, 1])
    for (let bit = 0; bit < 32; bit += 5) {
      const key: [number, number] = [...keyOf(1234, "embed")];
      key[word] = (key[word]! ^ (1 << bit)) >>> 0;
      const out = new Int32Array(n);
      drawElements(out, unit, key, 0);
      // the first word is added to the counter: a difference of a power of two moves the elements
      if (word === 1 || bit > 20) others.push(new Float32Array(out.buffer));
    }
  for (let lag = 1; lag < 300; lag += 7) others.push(a.slice(lag, lag + n));
  for (const other of others) expect(correlation(other)).toBeLessThan(5);
});

test("however a range is cut, each global element is the same", () => {
  // the last start is near 2^33, where the number of a pair carries into its high word
  const origin = fc.oneof(fc.nat(50), fc.integer({ min: 2 ** 33 - 20, max: 2 ** 33 }));
  fc.assert(
    fc.property(origin, fc.array(fc.nat(9), { maxLength: 12 }), (start, cut) => {
      const length = cut.reduce((a, b) => a + b, 0);
      const pieces = cut.flatMap((size, i) => [...draw(size, 7, "layers.0.wq", start + cut.slice(0, i).reduce((a, b) => a + b, 0))]);
      expect(pieces).toEqual([...draw(length, 7, "layers.0.wq", start)]);
    }),
  );
});

test("a pair beyond 2^32 differs from the pair 2^32 before it", () => {
  expect([...draw(4, 7, "a", 2 ** 33)]).not.toEqual([...draw(4, 7, "a", 0)]);
});

test.each(["bf16", "f16"] as const)("%s weights are the f32 weights, rounded", (dtype) => {
  const [out, wide] = [new Uint16Array(1001), new Int32Array(1001)];
  drawElements(out, normalTable(0.02, dtype), keyOf(7, "head"), 5);
  drawElements(wide, normalTable(0.02, "f32"), keyOf(7, "head"), 5);
  const { words } = encoded(dtype, new Float32Array(wide.buffer));
  expect(valuesIn(typedMemory(dtype, out.buffer))).toEqual(valuesIn(typedMemory(dtype, words.buffer as ArrayBuffer)));
});

test("the rows of a shard's box are the elements of the shard", () => {
  const dim = fc.tuple(fc.integer({ min: 1, max: 4 }), fc.nat(3), fc.integer({ min: 1, max: 3 }));
  fc.assert(
    fc.property(fc.array(dim, { minLength: 0, maxLength: 3 }), (dims) => {
      const sizes = dims.map(([before, after, own]) => before - 1 + own + after);
      const ranges = dims.map(([before, , own]) => [[before - 1, before - 1 + own] as const]);
      const wanted: number[] = [];
      const walk = (d: number, at: number): void => {
        const [range] = ranges[d] ?? [];
        if (!range) return void wanted.push(at);
        for (let i = range[0]; i < range[1]; i++) walk(d + 1, at * sizes[d]! + i);
      };
      walk(0, 0);
      const box = shardBox(sizes, ranges);
      const found = Array.from({ length: box.rows * box.width }, (_, n) => {
        const row = Math.floor(n / box.width);
        return box.base + Math.floor(row / box.height) * box.planeStride + (row % box.height) * box.rowStride + (n % box.width);
      });
      expect(found).toEqual(wanted);
    }),
  );
});

test("output_scaling: depth divides the deviation of matrices into the residual stream by sqrt(2 layers), and of no other", () => {
  const moe = { experts: 4, top_k: 2, ffn: 64, shared: { ffn: 64 }, latent: 16, layers: [0, 1, 1, 1] };
  const stds = (init: object) => {
    const job = jobOf({ ...rest, model: { ...small, layers: 4, moe }, train: { ...step, init } });
    const { parameters } = compile(job).plan.programs[0]!;
    return new Map(parameters.filter((p) => p.init.type === "normal").map((p) => [p.name, p.init.std]));
  };
  const plain = stds({ std: 0.02 });
  expect(new Set(plain.values())).toEqual(new Set([0.02]));
  const scaled = stds({ std: 0.02, output_scaling: "depth" });
  const outputs = [...scaled].filter(([, std]) => std === 0.02 / Math.sqrt(8)).map(([name]) => name.replace(/^layers\.\d+\./, ""));
  expect(new Set(outputs)).toEqual(new Set(["wo", "w2", "shared.w2", "latent.up"]));
  expect([...scaled.values()].filter((std) => std === 0.02)).toHaveLength(plain.size - outputs.length);
});

test("the older key init_std is read, with a warning", () => {
  const text = (train: object) => JSON.stringify({ ...rest, model: small, train: { ...step, ...train } });
  const { job, findings } = readJob(text({ init_std: 0.3 }), "job.yaml", []);
  expect(job?.train.init.std).toBe(0.3);
  expect(findings.map(({ code }) => code)).toEqual(["B240"]);
  expect(readJob(text({ init: { std: 0.3 } }), "job.yaml", []).findings).toEqual([]);
});

test("initial weights do not change between versions: every run depends on them", () => {
  expect([...draw(4, 1234, "embed")]).toMatchInlineSnapshot(`
    [
      0.6119465231895447,
      -0.5038965344429016,
      -0.15980888903141022,
      1.6929270029067993,
    ]
  `);
});
