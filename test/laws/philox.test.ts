import { expect, test } from "vitest";
import { keyOf, philox } from "../../src/ops/philox.ts";

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
