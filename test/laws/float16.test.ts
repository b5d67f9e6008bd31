/** The two 16-bit floats: every number they have is itself, and what lies between two goes to the nearer one, or to the even one. */
import { expect, test } from "vitest";
import { decodeFloat16, encodeFloat16 } from "../../runtime/float16.ts";

const all = Uint16Array.from({ length: 65536 }, (_, h) => h);
const wide = (dtype: "bf16" | "f16", halves: Uint16Array): Float32Array => {
  const out = new Float32Array(halves.length);
  decodeFloat16(dtype, out, halves);
  return out;
};
const rounded = (dtype: "bf16" | "f16", values: readonly number[]): number[] => {
  const out = new Uint16Array(values.length);
  encodeFloat16(dtype, out, Float32Array.from(values));
  return [...out];
};

test.each([
  ["bf16", 0x7f80, 3.3895313892515355e38, 2 ** -133],
  ["f16", 0x7c00, 65504, 2 ** -24],
] as const)("%s", (dtype, infinity, largest, smallest) => {
  const values = wide(dtype, all);
  expect([values[infinity], values[infinity - 1], values[1]]).toEqual([Infinity, largest, smallest]);
  const numbers = [...all].filter((h) => (h & 0x7fff) <= infinity);
  expect(
    rounded(
      dtype,
      numbers.map((h) => values[h]!),
    ),
  ).toEqual(numbers);
  const names = [...all].filter((h) => (h & 0x7fff) > infinity);
  expect(
    wide(
      dtype,
      Uint16Array.from(
        rounded(
          dtype,
          names.map((h) => values[h]!),
        ),
      ),
    ).every(Number.isNaN),
  ).toBe(true);
  // doubles hold what lies between two of them exactly, and a float holds the middle, and its neighbours
  const word = new Float32Array(1);
  const bits = new Uint32Array(word.buffer);
  const near = (x: number, by: number): number => {
    word[0] = x;
    bits[0]! += by;
    return word[0]!;
  };
  for (const sign of [1, -1]) {
    const positive = numbers.filter((h) => h < infinity);
    // past the largest the next step would be the power of two above it
    const next = (h: number) => (h + 1 === infinity ? 2 * values[h]! - values[h - 1]! : values[h + 1]!);
    const middles = positive.map((h) => (values[h]! + next(h)) / 2);
    const of = (by: number) =>
      rounded(
        dtype,
        middles.map((x) => sign * near(x, by)),
      ).map((h) => h & 0x7fff);
    expect(of(0)).toEqual(positive.map((h) => h + (h % 2)));
    expect(of(1)).toEqual(positive.map((h) => h + 1));
    expect(of(-1)).toEqual(positive);
  }
});
