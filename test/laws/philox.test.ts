import fc from "fast-check";
import { expect, test } from "vitest";
import { fillNormal, keyOf, philox } from "../../src/ops/philox.ts";

// Known answers published with Random123 (kat_vectors, philox4x32 10): counter, key, words.
const known = [
  ["00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"],
  ["ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"],
  ["243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"],
] as const;

test.each(known)("counter %s, key %s gives %s", (counter, key, words) => {
  const [c0, c1, c2, c3, k0, k1] = `${counter} ${key}`.split(" ").map((word) => Number.parseInt(word, 16)) as [
    number,
    number,
    number,
    number,
    number,
    number,
  ];
  const out = new Uint32Array(4);
  philox(out, c0, c1, c2, c3, k0, k1);
  expect([...out].map((word) => word.toString(16).padStart(8, "0")).join(" ")).toBe(words);
});

test("a key is FNV-1a of seed and name", () => {
  // the hash of eight zero bytes alone is the offset basis times prime^8
  const prime = 0x100000001b3n;
  const zero = BigInt.asUintN(64, 0xcbf29ce484222325n * prime ** 8n);
  expect(keyOf(0, "")).toEqual([Number(zero & 0xffffffffn), Number(zero >> 32n)]);
  const keys = [keyOf(1, "a"), keyOf(2, "a"), keyOf(1, "b"), keyOf(2 ** 40 + 1, "a"), keyOf(1, "é")];
  expect(new Set(keys.map(String)).size).toBe(keys.length);
});

test("each global element is the same under any sharding", () => {
  // the last start is past 2^32 blocks, where the counter carries into its second word
  const origin = fc.oneof(fc.nat(50), fc.integer({ min: 2 ** 34 - 50, max: 2 ** 34 }));
  fc.assert(
    fc.property(origin, fc.array(fc.nat(9), { maxLength: 12 }), (start, shardedBy) => {
      const length = shardedBy.reduce((a, b) => a + b, 0);
      const whole = new Float32Array(length);
      fillNormal(whole, 7, "layers.0.wq", start, 0.02);
      const pieces = shardedBy.flatMap((size, i) => {
        const piece = new Float32Array(size);
        fillNormal(piece, 7, "layers.0.wq", start + shardedBy.slice(0, i).reduce((a, b) => a + b, 0), 0.02);
        return [...piece];
      });
      expect(pieces).toEqual([...whole]);
    }),
  );
});

test("the numbers are normal: moments of 400,000, and no two names or seeds alike", () => {
  const n = 400_000;
  const draw = (seed: number, name: string): Float32Array => {
    const out = new Float32Array(n);
    fillNormal(out, seed, name, 0, 2);
    return out;
  };
  const mean = (values: Float32Array, f: (x: number) => number): number => values.reduce((sum, x) => sum + f(x / 2), 0) / n;
  const a = draw(1234, "embed");
  // moments 1 to 4 of a unit normal, each within five standard errors
  [0, 1, 0, 3].forEach((moment, i) => {
    const spread = Math.sqrt([1, 2, 15, 96][i]! / n);
    expect(Math.abs(mean(a, (x) => x ** (i + 1)) - moment)).toBeLessThan(5 * spread);
  });
  for (const other of [draw(1234, "head"), draw(1235, "embed")]) {
    expect(Math.abs(a.reduce((sum, x, i) => sum + x * other[i]!, 0) / (4 * n))).toBeLessThan(5 / Math.sqrt(n));
  }
  expect(Math.max(...a.subarray(0, 100_000).map(Math.abs))).toBeLessThan(2 * 7);
});

test("initial weights stay what they are: a change here changes every run", () => {
  const out = new Float32Array(4);
  fillNormal(out, 1234, "embed", 0, 1);
  expect([...out]).toMatchInlineSnapshot(`
    [
      0.42855483293533325,
      0.2041049301624298,
      0.2568363547325134,
      0.5960161685943604,
    ]
  `);
});
