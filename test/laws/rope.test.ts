/** Rotary positions: frequencies are those of Hugging Face transformers, whatever the scaling; pairs and positions may lie in any order. */
import { describe, expect, test } from "vitest";
import { buildModel } from "../../src/model/model.ts";
import { positionOf } from "../../src/ops/positions.ts";
import { frequenciesOf, rope } from "../../src/ops/rope.ts";
import { addBackward } from "../../src/passes/backward.ts";
import { distance, jobOf } from "../support/job.ts";

/** The attributes of the first layer's query embedding. */
function attributesOf(model: object): Readonly<Record<string, number>> {
  const job = jobOf({
    name: "rope",
    model: { layers: 1, hidden: 64, heads: 4, head_dim: 16, vocab: 256, seq: 32, ...model },
    train: { steps: 1, optimizer: { lr: 1 } },
    data: { path: "x" },
  });
  const node = addBackward(buildModel(job)).order.find((n) => n.op === rope)!;
  return node.attrs;
}

// what modeling_rope_utils.py of transformers 5.17 gives for a head of 16 channels, in f32
const theirs: readonly (readonly [string, object, readonly number[], number])[] = [
  ["no scaling", { theta: 1e4 }, [1, 0.3162278, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278], 1],
  [
    "linear",
    { scaling: { type: "linear", factor: 4 } },
    [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-5],
    1,
  ],
  [
    "llama3",
    { theta: 5e5, scaling: { type: "llama3", factor: 8, original_seq: 8192 } },
    [1, 0.1939228, 0.03760603, 0.007292665, 0.000524846, 3.428102e-5, 6.64787e-6, 1.289173e-6],
    1,
  ],
  [
    "yarn with equal scales",
    { scaling: { type: "yarn", factor: 40, original_seq: 4096, mscale: 1, mscale_all_dim: 1 } },
    [1, 0.3162278, 0.1, 0.02391472, 0.005125, 0.0008498622, 2.5e-5, 7.905694e-6],
    1,
  ],
  [
    "yarn with two scales",
    { scaling: { type: "yarn", factor: 8, original_seq: 64, mscale: 1, mscale_all_dim: 0.8 } },
    [1, 0.2239947, 0.04166666, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-5],
    1.0356570849393496,
  ],
  [
    "yarn without scales",
    { theta: 1e6, scaling: { type: "yarn", factor: 4, original_seq: 32768 } },
    [1, 0.1778279, 0.03162278, 0.00421756, 0.0005, 4.445699e-5, 7.905694e-6, 1.405853e-6],
    1.138629436111989,
  ],
  [
    "yarn that steps at one pair",
    { scaling: { type: "yarn", factor: 16, original_seq: 100, beta_fast: 2, beta_slow: 2, attention_factor: 1.5 } },
    [1, 0.3162278, 0.00625, 0.001976424, 0.000625, 0.0001976424, 6.25e-5, 1.976424e-5],
    1.5,
  ],
];
test.each(theirs)("%s", (_, embedding, frequencies, gain) => {
  const d = attributesOf({ rope: embedding });
  for (const [c, f] of frequenciesOf(d).entries()) expect(Math.abs(f / frequencies[c]! - 1), `pair ${c}`).toBeLessThan(1e-6);
  expect(d.gain).toBeCloseTo(gain, 12);
});

describe("the order of channels", () => {
  const [B, S, H, C] = [1, 12, 2, 8];
  const x = Float32Array.from({ length: B * S * H * C }, (_, i) => Math.sin(i * i));
  const run = (from: Float32Array, change: object): Float32Array => {
    const y = new Float32Array(from.length);
    const place = { start: () => 0, rows: new Int32Array(1) };
    rope.cpu({ x: from, y }, { ...attributesOf({ head_dim: C }), B, S, H, C, ...change }, place);
    return y;
  };

  test("interleaved pairs are the halves' pairs in another order", () => {
    // channel c of a head's halves lies at 2c, channel c + C/2 at 2c + 1
    const woven = (of: Float32Array) => of.map((_, i) => of[Math.floor(i / C) * C + Math.floor((i % C) / 2) + (i % 2) * (C / 2)]!);
    expect(distance(run(woven(x), { interleaved: 1 }), woven(run(x, {})))).toBe(0);
    expect(distance(run(x, { interleaved: 1 }), run(x, {}))).toBeGreaterThan(0.1);
  });

  test("channels without rotation are copied", () => {
    const y = run(x, { first: 2, width: 4 });
    const inside = (i: number) => i % C >= 2 && i % C < 6;
    for (const [i, value] of y.entries()) if (!inside(i)) expect(value).toBe(x[i]);
    expect(y.filter((value, i) => i >= H * C && inside(i) && value === x[i])).toHaveLength(0);
  });

  test("sharded blocks rotate by their own positions", () => {
    const [chunk, ranks] = [2, 3];
    const width = H * C;
    const lies = Array.from({ length: S }, (_, i) => positionOf(i, chunk, ranks));
    expect(lies).toEqual([0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]);
    const dealt = (of: Float32Array) => Float32Array.from(lies.flatMap((p) => [...of.subarray(p * width, (p + 1) * width)]));
    expect(distance(run(dealt(x), { chunk, ranks }), dealt(run(x, {})))).toBe(0);
  });

  test("each position occurs once, and a rank's blocks lie alike around the middle", () => {
    for (const [chunk, ranks] of [
      [1, 1],
      [4, 2],
      [3, 8],
    ] as const) {
      const all = Array.from({ length: 2 * chunk * ranks }, (_, i) => positionOf(i, chunk, ranks));
      expect([...all].sort((a, b) => a - b)).toEqual(all.map((_, i) => i));
      for (let r = 0; r < ranks; r++) {
        const own = all.slice(2 * r * chunk, 2 * (r + 1) * chunk);
        expect(own.reduce((a, b) => a + b, 0)).toBe(chunk * (2 * chunk * ranks - 1));
      }
    }
    expect(positionOf(17, 0, 4)).toBe(17);
  });
});
