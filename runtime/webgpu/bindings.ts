/** Bind groups: the buffer ranges of a launch, and one uniform of integers. Equal uniforms share a GPUBuffer. */
/// <reference types="@webgpu/types" />
import type { BufferRange } from "./arenas.ts";
import { type Gpu, usage } from "./device.ts";

/** Creates a bind group. */
export type Bind = (label: string, layout: GPUBindGroupLayout, places: readonly BufferRange[], uniform?: readonly number[]) => GPUBindGroup;

/** Kernels read whole vectors, also at the end of a buffer; the alignment of buffers leaves room for it. */
const VECTOR = 16;
const wholeVectors = (bytes: number): number => Math.max(1, Math.ceil(bytes / VECTOR)) * VECTOR;

/** Returns a function that creates bind groups, with a cache of uniforms. */
export function binder({ device }: Gpu): Bind {
  const uniforms = new Map<string, GPUBuffer>();
  const uniformOf = (values: readonly number[]): GPUBuffer => {
    const key = values.join();
    const known = uniforms.get(key);
    if (known) return known;
    const size = wholeVectors(4 * values.length);
    const made = device.createBuffer({ label: `numbers ${key}`, size, usage: usage.uniform | usage.copyTarget });
    device.queue.writeBuffer(
      made,
      0,
      Int32Array.from({ length: size / 4 }, (_, i) => values[i] ?? 0),
    );
    uniforms.set(key, made);
    return made;
  };
  return (label, layout, places, uniform) =>
    device.createBindGroup({
      label,
      layout,
      entries: [
        ...places.map(({ buffer, offset, bytes }, binding) => ({ binding, resource: { buffer, offset, size: wholeVectors(bytes) } })),
        ...(uniform ? [{ binding: places.length, resource: { buffer: uniformOf(uniform) } }] : []),
      ],
    });
}
