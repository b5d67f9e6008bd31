/** Initial weights on a WebGPU device (src/ops/normalDraw.ts): hashes of integers choose words of a table that the host makes. */
/// <reference types="@webgpu/types" />
import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import type { Buffer } from "../../schemas/plan.ts";
import { type ElementWords, normalTable } from "../../src/ops/normalDraw.ts";
import type { NormalDraw } from "../backend.ts";
import type { BufferRange } from "./arenas.ts";
import type { Bind } from "./bindings.ts";
import { gridOf } from "./collectives.ts";
import type { Commands } from "./commands.ts";
import type { Gpu } from "./device.ts";
import type { Compile, ComputePipeline, ShaderSource } from "./pipelines.ts";

/** What the writer of weights needs of the device. */
export interface WeightsDevice {
  readonly gpu: Gpu;
  readonly commands: Commands;
  readonly compile: Compile;
  readonly bind: Bind;
}
/** Writes initial weights to buffers of a rank. `place` returns the memory of a buffer. */
export type DrawWeights = (rank: number, buffers: readonly Buffer[], draw: NormalDraw, place: (b: Buffer) => BufferRange) => void;

/** Returns the source for elements of 4 or of 2 bytes. A thread writes one word: one element, or two. */
function drawSource(bytes: 2 | 4): ShaderSource {
  const value =
    bytes === 4
      ? "element(i)"
      : // the second element of the last word may be beyond the shard
        "element(2u * i) | select(0u, element(2u * i + 1u) << 16u, 2u * i + 1u < draw.rows * draw.width)";
  const code = `struct Draw { rows: u32, height: u32, width: u32, row_stride: u32, plane_stride: u32, base: u32, key0: u32, key1: u32 }
@group(0) @binding(0) var<storage, read_write> table: array<u32>;
@group(0) @binding(1) var<storage, read_write> result: array<u32>;
@group(0) @binding(2) var<uniform> draw: Draw;

fn hash_of(low: u32) -> u32 {
  var x = (low ^ (low >> 17u)) * 0xed5ad4bbu + draw.key1;
  x = (x ^ (x >> 11u)) * 0xac4c1b51u;
  x = (x ^ (x >> 15u)) * 0x31848babu;
  return x ^ (x >> 14u);
}
fn element(n: u32) -> u32 {
  let row = n / draw.width;
  let plane = row / draw.height;
  let at = draw.base + plane * draw.plane_stride + (row % draw.height) * draw.row_stride + n % draw.width;
  let half = (hash_of((at >> 1u) + draw.key0) >> (16u * (at & 1u))) & 0xffffu;
  let index = half & 0x7fffu;
  return ${bytes === 4 ? "table[index] | ((half & 0x8000u) << 16u)" : "((table[index >> 1u] >> (16u * (index & 1u))) & 0xffffu) | (half & 0x8000u)"};
}
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
  let i = (group.y * groups.x + group.x) * 256u + lane;
  if (i >= ${bytes === 4 ? "draw.rows * draw.width" : "(draw.rows * draw.width + 1u) / 2u"}) { return; }
  result[i] = ${value};
}
`;
  return { name: `initial weights of ${bytes} bytes`, code, entries: [{ entry: "main", buffers: 2, uniform: true }] };
}

/** Compiles the kernels of initial weights for these element types. */
export async function openWeights({ gpu, commands, compile, bind }: WeightsDevice, types: ReadonlySet<Dtype>): Promise<DrawWeights> {
  const sizes = new Set([...types].map((dtype) => dtypes[dtype].bytes));
  const compiled = ([2, 4] as const)
    .filter((bytes) => sizes.has(bytes))
    .map(async (bytes) => [bytes, await compile(drawSource(bytes))] as const);
  const pipelines = new Map<number, readonly ComputePipeline[]>(await Promise.all(compiled));
  const tables = new Map<string, BufferRange>();
  const tableOf = (std: number, dtype: Dtype): BufferRange => {
    const known = tables.get(`${std} ${dtype}`);
    if (known) return known;
    const words: ElementWords = normalTable(std, dtype);
    const range = { buffer: gpu.make(`initial weights ${std} ${dtype}`, words.byteLength), offset: 0, bytes: words.byteLength };
    commands.write(range, words);
    tables.set(`${std} ${dtype}`, range);
    return range;
  };
  return (rank, buffers, { key, std, box }, place) => {
    const last = box.base + (box.rows / box.height) * box.planeStride;
    if (last > 2 ** 32) throw new Error("rankc: a parameter has more elements than a WebGPU kernel can index");
    const numbers = [box.rows, box.height, box.width, box.rowStride, box.planeStride, box.base, ...key].map((n) => n | 0);
    for (const b of buffers) {
      const { bytes } = dtypes[b.dtype];
      const [pipeline] = pipelines.get(bytes) ?? [];
      if (!pipeline) throw new Error(`rankc: initial weights are not drawn in ${b.dtype}`);
      const group = bind(`initial weights of ${b.id}, rank ${rank}`, pipeline.layout, [tableOf(std, b.dtype), place(b)], numbers);
      const words = Math.ceil((box.rows * box.width * bytes) / 4);
      const of = { rank, id: b.id, op: "weights", kernel: `weights_${bytes}` };
      commands.dispatch({ pipeline: pipeline.pipeline, group, grid: gridOf(words), of });
    }
  };
}
