/** The kernels of CUDA and WebGPU write the initial weights of the CPU, bit for bit, in every shard and type; those of CUDA also weights of checkpoints. */
import { expect, test } from "vitest";
import type { ShardBox } from "../../runtime/backend.ts";
import { shardBox } from "../../runtime/shards.ts";
import { binder } from "../../runtime/webgpu/bindings.ts";
import { commandsOn } from "../../runtime/webgpu/commands.ts";
import { dawn } from "../../runtime/webgpu/dawn.ts";
import { openDevice } from "../../runtime/webgpu/device.ts";
import { openWeights } from "../../runtime/webgpu/initialWeights.ts";
import { compiler } from "../../runtime/webgpu/pipelines.ts";
import { type Dtype, dtypes, encoded, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { Buffer as PlanBuffer } from "../../schemas/plan.ts";
import { weightsKernel } from "../../src/codegen/cuda/weights.ts";
import type { KernelSpec } from "../../src/codegen/kernelSpec.ts";
import { drawElements, normalTable } from "../../src/ops/normalDraw.ts";
import { keyOf } from "../../src/ops/philox.ts";
import { cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { noAdapter } from "../support/softwareAdapter.ts";

const range = (from: number, to: number) => [[from, to] as const];
/** Whole; rows; columns of odd number; planes; a block of all three dims. */
const boxes: Readonly<Record<string, ShardBox>> = {
  "a whole vector": shardBox([77], [range(0, 77)]),
  rows: shardBox([24, 35], [range(6, 12), range(0, 35)]),
  "an odd number of columns": shardBox([9, 35], [range(0, 9), range(7, 14)]),
  "experts, rows and columns": shardBox([6, 10, 21], [range(2, 4), range(5, 10), range(14, 21)]),
};
const key = keyOf(7, "layers.0.wq");
const std = 0.02;

/** What the CPU draws. */
function reference({ rows, height, width, rowStride, planeStride, base }: ShardBox, dtype: Dtype): number[] {
  const out = dtypes[dtype].bytes === 4 ? new Int32Array(rows * width) : new Uint16Array(rows * width);
  for (let row = 0; row < rows; row++) {
    const start = base + Math.floor(row / height) * planeStride + (row % height) * rowStride;
    drawElements(out.subarray(row * width, (row + 1) * width), normalTable(std, dtype), key, start);
  }
  return [...out];
}

const missing = await emulatorMissing();
const kernel = weightsKernel("weights");
const use: KernelSpec = {
  ...{
    op: "add",
    name: "weights",
    d: {},
    size: {},
    dtype: { table: "i32", out: "i32", table16: "i32", out16: "i32", source: "i32", bad: "i32" },
  },
  ...{ accumulates: new Set(), bound: 0, makesRows: false, mayOverflow: false },
};
const emulator = cudaEmulator([{ use, made: kernel }]);
/** The kernel with one of its launches, in this grid. */
const launched = (name: string, grid: [number, number, number]) => ({
  ...kernel,
  launches: kernel.launches.filter(({ entry }) => entry === `weights_${name}`).map((l) => ({ ...l, grid })),
});
/** Two 16-bit elements in each word. */
const packed = (elements: ArrayLike<number>): Int32Array => {
  const halfWords = Uint16Array.from({ length: Math.ceil(elements.length / 2) * 2 }, (_, i) => elements[i] ?? 0);
  return new Int32Array(halfWords.buffer);
};

test.skipIf(missing).each(Object.entries(boxes))(`CUDA${missing ? ` (skipped: ${missing})` : ""}: %s`, async (_, box) => {
  const made = launched("draw", [2, 1, 1]);
  const count = box.rows * box.width;
  const far = { ...box, base: box.base + 2 ** 33 + 5 };
  for (const b of [box, far]) {
    const all = await emulator.run(
      made,
      use,
      {
        table: normalTable(std, "f32") as Int32Array,
        out: new Int32Array(count),
        table16: packed(normalTable(std, "bf16")),
        out16: new Int32Array(Math.ceil(count / 2)),
      },
      {
        ...{ rows: b.rows, height: b.height, width: b.width, row_stride: b.rowStride, plane_stride: b.planeStride },
        ...{ base_low: b.base % 2 ** 32, base_high: Math.floor(b.base / 2 ** 32), key0: key[0], key1: key[1] },
      },
    );
    expect([...all.out!]).toEqual(reference(b, "f32"));
    expect([...all.out16!]).toEqual([...packed(reference(b, "bf16"))]);
  }
});

test.skipIf(missing).each([
  ["bf16", "f16", 70, 37, 41, true],
  ["f16", "bf16", 5, 100, 100, false],
  ["f32", "bf16", 33, 64, 64, true],
] as const)("CUDA places a matrix of %s as f32 and %s", async (from, to, rows, columns, stride, isTransposed) => {
  const values = Float32Array.from({ length: (rows - 1) * stride + columns }, (_, i) => Math.sin(i) * 3);
  const source = encoded(from, values).words;
  const numbers = {
    ...{
      rows,
      columns,
      stride,
      row_step: isTransposed ? 1 : columns,
      column_step: isTransposed ? rows : 1,
      to_low: 6,
      to_high: 0,
      piece: 3,
    },
    ...{ type: ["f32", "bf16", "f16"].indexOf(from), type16: ["f32", "bf16", "f16"].indexOf(to) },
  };
  const place = async (bytes: ArrayBuffer) => {
    const [out, out16] = [new Int32Array(rows * columns + 6), new Int32Array(Math.ceil((rows * columns + 6) / 2))];
    const words = new Int32Array(Math.ceil(bytes.byteLength / 4));
    new Uint8Array(words.buffer).set(new Uint8Array(bytes));
    const grid: [number, number, number] = [Math.ceil(columns / 32), 2, 1];
    return emulator.run(launched("place", grid), use, { source: words, out, out16, bad: Int32Array.of(7) }, numbers);
  };
  const read = valuesIn(typedMemory(from, source.buffer as ArrayBuffer)) as Float32Array;
  const wanted = new Float32Array(rows * columns + 6);
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) wanted[6 + (isTransposed ? c * rows + r : r * columns + c)] = read[r * stride + c]!;
  const all = await place(source.buffer as ArrayBuffer);
  expect(new Float32Array(Int32Array.from(all.out!).buffer)).toEqual(wanted);
  expect([...all.out16!]).toEqual([...packed(encoded(to, wanted).words)]);
  expect([...all.bad!]).toEqual([7]);
  // the last element of the last row
  const spoiled = encoded(from, values.with(values.length - 1, Number.NaN)).words.buffer as ArrayBuffer;
  expect([...(await place(spoiled)).bad!]).toEqual([3]);
});

test.skipIf(noAdapter)(`WebGPU${noAdapter ? ` (skipped: ${noAdapter})` : ""}`, async () => {
  const gpu = await openDevice(dawn, "baseline");
  try {
    const commands = commandsOn(gpu, { timed: false });
    const draw = await openWeights({ gpu, commands, compile: compiler(gpu), bind: binder(gpu) }, new Set<Dtype>(["f32", "bf16", "f16"]));
    for (const [name, box] of Object.entries(boxes))
      for (const dtype of ["f32", "bf16", "f16"] as const) {
        const elements = box.rows * box.width;
        const bytes = Math.ceil((elements * dtypes[dtype].bytes) / 4) * 4;
        const place = { buffer: gpu.make(name, 4096), offset: 256, bytes };
        draw(0, [{ id: name, dtype } as PlanBuffer], { key, std, box }, () => place);
        const [found] = await commands.read([place]);
        const words = dtype === "f32" ? new Int32Array(found!) : new Uint16Array(found!);
        expect([...words.subarray(0, elements)], `${name}, ${dtype}`).toEqual(reference(box, dtype));
      }
  } finally {
    gpu.close();
  }
});
