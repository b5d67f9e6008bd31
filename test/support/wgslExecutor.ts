/**
 * Runs one WGSL kernel on a WebGPU device, for the contract of kernels: all operands in one buffer, 256 bytes apart as a
 * plan lays them out, so that what is written past an operand is found. Where the device has no f16, the source is run with
 * f32 in its place: that shows everything but the rounding.
 */
/// <reference types="@webgpu/types" />

import { isNumber, uniformOf } from "../../runtime/webgpu/pipelines.ts";
import { bytesOf, type Dtype, encoded, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { Arg, Launch } from "../../schemas/plan.ts";
import { planLaunch } from "../../src/codegen/launchArgs.ts";
import { type Buffers, type Executor, isOutput, startIn } from "./contract.ts";

const usage = { mapRead: 1, copySource: 4, copyTarget: 8, uniform: 64, storage: 128 };
const ALIGN = 256;

export function wgslExecutor(device: GPUDevice, adapter: string): Executor {
  const f16 = device.features.has("shader-f16");
  const stored = (dtype: Dtype | undefined): Dtype => (dtype === "f16" && !f16 ? "f32" : (dtype ?? "i32"));
  const known = new Map<string, Promise<{ pipeline: GPUComputePipeline; layout: GPUBindGroupLayout }>>();
  /** Cases that differ in their name alone, or in a type that is replaced, share a pipeline: making one takes longer than running it. */
  function pipelineOf(text: string, { entry, args }: Launch, name: string) {
    const code = f16 ? text : withoutF16(text);
    const key = `${entry.replace(name, "kernel")} ${code}`;
    const have = known.get(key) ?? makePipeline(code, entry.replace(name, "kernel"), split(args));
    known.set(key, have);
    return have;
  }
  async function makePipeline(code: string, entryPoint: string, { numbers, buffers }: ReturnType<typeof split>) {
    device.pushErrorScope("validation");
    const module = device.createShaderModule({ code });
    const types: GPUBufferBindingType[] = [...buffers.map(() => "storage" as const), ...(numbers.length ? ["uniform" as const] : [])];
    const layout = device.createBindGroupLayout({ entries: types.map((type, binding) => ({ binding, visibility: 4, buffer: { type } })) });
    const pipelineLayout = device.createPipelineLayout({ bindGroupLayouts: [layout] });
    const pipeline = device.createComputePipeline({ layout: pipelineLayout, compute: { module, entryPoint } });
    const scope = device.popErrorScope();
    const errors = (await module.getCompilationInfo()).messages.filter((m) => m.type === "error");
    if (errors.length)
      throw new Error(errors.map((m) => `${m.lineNum}:${m.linePos} ${m.message}: ${code.split("\n")[m.lineNum - 1]}`).join("\n"));
    const wrong = await scope;
    if (wrong) throw new Error(wrong.message);
    return { pipeline, layout };
  }

  return {
    name: adapter,
    async run(made, use, data, starts) {
      const offsets: Record<string, number> = {};
      let bytes = ALIGN;
      for (const [name, x] of Object.entries(data)) {
        offsets[name] = bytes;
        bytes += Math.ceil((x.length * bytesOf[stored(use.dtype[name])]) / ALIGN + 1) * ALIGN;
      }
      const before = new Uint8Array(bytes).fill(0xff);
      for (const [name, x] of Object.entries(data)) {
        if (name in use.dtype && isOutput(use.op, name) && !use.accumulates.has(name)) continue;
        before.set(packed(x, stored(use.dtype[name])), offsets[name]);
      }
      const sizeOf = (name: string) => data[name]!.length * bytesOf[stored(use.dtype[name])];

      const launches = made.launches.map(planLaunch);
      const pipelines = await Promise.all(launches.map((l) => pipelineOf(made.source.replaceAll(use.name, "kernel"), l, use.name)));
      device.pushErrorScope("validation");
      const arena = device.createBuffer({ size: bytes, usage: usage.storage | usage.copySource | usage.copyTarget });
      const scratch = device.createBuffer({ size: Math.max(ALIGN, made.scratch ?? 0), usage: usage.storage | usage.copyTarget });
      device.queue.writeBuffer(arena, 0, before);
      device.queue.writeBuffer(scratch, 0, new Uint8Array(scratch.size).fill(0xff));

      const encoder = device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      for (const [i, { grid, args }] of launches.entries()) {
        const { buffers } = split(args);
        const entries: GPUBindGroupEntry[] = buffers.map((a, binding) => {
          const name = a.kind === "operand" ? a.name : a.kind;
          const resource =
            a.kind === "scratch"
              ? { buffer: scratch, offset: a.offset, size: scratch.size - a.offset }
              : { buffer: arena, offset: offsets[name]!, size: Math.ceil(sizeOf(name) / 4) * 4 };
          return { binding, resource };
        });
        const numbers = uniformOf(args, (arg) => startIn(starts, arg));
        if (numbers) {
          const uniform = device.createBuffer({ size: numbers.length > 4 ? 32 : 16, usage: usage.uniform | usage.copyTarget });
          device.queue.writeBuffer(uniform, 0, Int32Array.from(numbers));
          entries.push({ binding: buffers.length, resource: { buffer: uniform } });
        }
        const { pipeline, layout } = pipelines[i]!;
        pass.setPipeline(pipeline);
        pass.setBindGroup(0, device.createBindGroup({ layout, entries }));
        pass.dispatchWorkgroups(...grid);
      }
      pass.end();
      const staging = device.createBuffer({ size: bytes, usage: usage.mapRead | usage.copyTarget });
      encoder.copyBufferToBuffer(arena, 0, staging, 0, bytes);
      device.queue.submit([encoder.finish()]);
      const wrong = await device.popErrorScope();
      if (wrong) throw new Error(wrong.message);
      await staging.mapAsync(1);
      const after = new Uint8Array(staging.getMappedRange().slice(0));
      for (const b of [arena, scratch, staging]) b.destroy();

      const result: Buffers = {};
      const used = new Uint8Array(bytes);
      for (const name of Object.keys(data)) {
        const end = offsets[name]! + sizeOf(name);
        used.fill(1, offsets[name], end);
        result[name] = unpacked(after.slice(offsets[name], end), stored(use.dtype[name]));
      }
      const past = after.findIndex((byte, i) => !used[i] && byte !== 0xff);
      if (past >= 0) throw new Error(`byte ${past} was written, which belongs to no operand (they begin at ${JSON.stringify(offsets)})`);
      return result;
    },
  };
}

function packed(x: Float32Array | Int32Array, dtype: Dtype): Uint8Array {
  const { words } = encoded(dtype, x);
  return new Uint8Array(words.buffer, words.byteOffset, words.byteLength);
}
function unpacked(bytes: Uint8Array, dtype: Dtype): Float32Array | Int32Array {
  return valuesIn(typedMemory(dtype, new Uint8Array(bytes).buffer));
}
/** The arguments of a launch: those that are numbers, and those that are buffers. */
const split = (args: readonly Arg[]) => ({ numbers: args.filter(isNumber), buffers: args.filter((a) => !isNumber(a)) });
export const withoutF16 = (source: string): string => source.replace("enable f16;\n", "").replace(/\bf16\b/g, "f32");
