import { describe, expect, test } from "vitest";
import { BESIDE, EncodeBuffer, placeColumns, Regions } from "../../runtime/checkpoint/exportMemory.ts";
import { sha256 } from "../../runtime/checkpoint/safetensors.ts";

describe("regions of memory", () => {
  test("do not overlap, are served in order, and never exceed the block", async () => {
    const regions = new Regions(1000);
    const all = 1000 + BESIDE;
    const [a, b] = [await regions.take(1000), await regions.take(BESIDE - 8)];
    expect(a.at + a.bytes).toBeLessThanOrEqual(b.at);
    const order: string[] = [];
    const taken = async (name: string, bytes: number) => {
      const region = await regions.take(bytes);
      order.push(name);
      return region;
    };
    const [large, small] = [taken("large", all), taken("small", 8)];
    regions.give(a);
    await Promise.resolve();
    expect(order).toEqual([]);
    regions.give(b);
    regions.give(await large);
    regions.give(await small);
    expect(order).toEqual(["large", "small"]);
    expect(regions.peak).toBe(all);
    expect(() => regions.take(all + 8)).toThrow(`a region of ${all + 8} of ${all} bytes`);
  });

  test.each([
    ["bf16", 2],
    ["f32", 4],
  ] as const)("collect columns of a matrix in %s, whatever their number", async (dtype, size) => {
    const [rows, cols] = [130, 70];
    const regions = new Regions(rows * cols * size);
    const encode = new EncodeBuffer();
    const columnsOf = (first: number, count: number) =>
      Float32Array.from({ length: count * rows }, (_, i) => ((i % rows) * cols + first + Math.floor(i / rows)) % 251);
    for (const each of [1, 7, 65, 70]) {
      const region = await regions.take(rows * cols * size);
      for (let first = 0; first < cols; first += each)
        placeColumns(encode.encode(dtype, columnsOf(first, Math.min(each, cols - first))), { rows, cols, first }, size, region);
      const found = new Uint8Array(region.memory, region.at, region.bytes);
      const wanted = new EncodeBuffer().encode(
        dtype,
        Float32Array.from({ length: rows * cols }, (_, i) => i % 251),
      );
      expect(sha256(found)).toBe(sha256(wanted));
      regions.give(region);
    }
  });
});
