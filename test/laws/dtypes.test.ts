/** The table of element types: exact decoding of every code, rounding to nearest even, and elements in memory. */
import { describe, expect, test } from "vitest";
import { bytesOf, type Dtype, dtypeNames, dtypes, encoded, isFloat16, storeValues, typedMemory, valuesIn } from "../../schemas/dtypes.ts";

/** The formats by their definitions: bits of exponent and mantissa, the first code beyond the finite ones, and the largest value. */
const formats = [
  { dtype: "bf16", exponent: 8, mantissa: 7, end: 0x7f80, largest: 3.3895313892515355e38, infinite: true },
  { dtype: "f16", exponent: 5, mantissa: 10, end: 0x7c00, largest: 65504, infinite: true },
  { dtype: "f8e4m3", exponent: 4, mantissa: 3, end: 0x7f, largest: 448, infinite: false },
] as const satisfies readonly { dtype: Dtype; exponent: number; mantissa: number; end: number; largest: number; infinite: boolean }[];

const codesOf = (dtype: Dtype, codes: readonly number[]): Float32Array => {
  const memory = typedMemory(dtype, new ArrayBuffer(codes.length * bytesOf[dtype]));
  memory.words.set(codes);
  return Float32Array.from(valuesIn(memory));
};
const rounded = (dtype: Dtype, values: readonly number[]): number[] => [...encoded(dtype, Float32Array.from(values)).words];

test("every float but f32 is in the list of formats", () => {
  const encodedTypes = dtypeNames.filter((dtype) => dtypes[dtype].codec !== null);
  expect(encodedTypes).toEqual(formats.map(({ dtype }) => dtype));
});

describe.each(formats)("$dtype", ({ dtype, exponent, mantissa, end, largest, infinite }) => {
  const signBit = 2 ** (exponent + mantissa);
  const codes = Array.from({ length: 2 * signBit }, (_, code) => code);
  const values = codesOf(dtype, codes);
  const bias = 2 ** (exponent - 1) - 1;
  const finite = Array.from({ length: end }, (_, code) => code);
  /** By the definition: 0.m x 2^(1 - bias) for exponent 0, otherwise 1.m x 2^(e - bias). */
  const defined = (code: number): number => {
    const [e, m] = [Math.floor(code / 2 ** mantissa), (code % 2 ** mantissa) / 2 ** mantissa];
    return e === 0 ? m * 2 ** (1 - bias) : (1 + m) * 2 ** (e - bias);
  };

  test("each code has the value of the definition", () => {
    expect([...values.subarray(0, end)]).toEqual(finite.map(defined));
    expect([...values.subarray(signBit, signBit + end)]).toEqual(finite.map((code) => -defined(code)));
    expect(values[end - 1]).toBe(largest);
    const beyond = codes.filter((code) => code % signBit >= end);
    const infinities = infinite ? [Infinity, -Infinity] : [];
    expect(beyond.map((code) => values[code]!).filter((value) => !Number.isNaN(value))).toEqual(infinities);
  });

  test("a value of the format is stored exactly, and NaN as a NaN", () => {
    const signed = [...finite, ...finite.map((code) => signBit + code)];
    expect(
      rounded(
        dtype,
        signed.map((code) => values[code]!),
      ),
    ).toEqual(signed);
    expect(codesOf(dtype, rounded(dtype, [Number.NaN]))).toEqual(Float32Array.of(Number.NaN));
  });

  test("a value between two of the format is rounded to the nearer one, and from the middle to the even one", () => {
    const word = new Float32Array(1);
    const bits = new Uint32Array(word.buffer);
    const near = (x: number, by: number): number => {
      word[0] = x;
      bits[0]! += by;
      return word[0]!;
    };
    // beyond the largest value the next one would follow at the same distance
    const next = (code: number) => (code + 1 === end ? 2 * values[code]! - values[code - 1]! : values[code + 1]!);
    const middles = finite.map((code) => (values[code]! + next(code)) / 2);
    const top = infinite ? end : end - 1;
    for (const sign of [1, -1]) {
      const stored = (by: number) =>
        rounded(
          dtype,
          middles.map((x) => sign * near(x, by)),
        ).map((code) => code % signBit);
      expect(stored(0)).toEqual(finite.map((code) => Math.min(top, code + (code % 2))));
      expect(stored(1)).toEqual(finite.map((code) => Math.min(top, code + 1)));
      expect(stored(-1)).toEqual(finite);
    }
  });

  test("a value beyond the format is stored as infinity, or as the largest value where there is none", () => {
    const top = infinite ? end : end - 1;
    expect(rounded(dtype, [3.4e38, Infinity, -3.4e38, -Infinity])).toEqual([top, top, signBit + top, signBit + top]);
  });
});

test("bytes of the table are bytes of the array", () => {
  for (const dtype of dtypeNames) {
    expect(bytesOf[dtype]).toBe(dtypes[dtype].array.BYTES_PER_ELEMENT);
    expect(isFloat16(dtype)).toBe(["bf16", "f16"].includes(dtype));
  }
});

test("elements are views: storing changes the memory, and values are decoded from it", () => {
  for (const dtype of dtypeNames) {
    const memory = new ArrayBuffer(4 * bytesOf[dtype]);
    storeValues(typedMemory(dtype, memory, bytesOf[dtype], 2), Float32Array.of(1, 2));
    expect([...valuesIn(typedMemory(dtype, memory))]).toEqual([0, 1, 2, 0]);
  }
});
