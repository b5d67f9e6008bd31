/**
 * The device memory of one rank, with buffers at the plan's offsets. All arenas share one GPUBuffer, because each GPUBuffer that a dispatch
 * binds costs host time; they are split over several only if the device's limit requires it. A buffer is never split.
 */

import { bytesOf } from "../../schemas/dtypes.ts";
import { itemOf } from "../../schemas/lookup.ts";
import type { Buffer, BufferKind } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { StageProgram } from "../rankPrograms.ts";
import type { Gpu } from "./device.ts";

/** A byte range on the device. */
export interface BufferRange {
  readonly buffer: GPUBuffer;
  readonly offset: number;
  readonly bytes: number;
}

/** Limits in bytes: the largest GPUBuffer, and the largest binding. */
export interface Limits {
  readonly buffer: number;
  readonly binding: number;
}

/** The arenas of a rank. */
export interface GpuArenas {
  place(b: Buffer, copy: number): BufferRange;
  /** Gradients and accumulators, which are zeroed at the start of a step. */
  readonly gradients: readonly BufferRange[];
  readonly scratch: BufferRange;
}

/** Returns the size of a buffer in bytes. */
export const bytesOfBuffer = (b: Buffer): number => bytesOf[b.dtype] * elementsOf(b.shape);

/** Allocates the arenas of a rank, which runs `own`. Throws a Trouble if the limits do not suffice. */
export function makeArenas(gpu: Gpu, own: StageProgram, rank: number, limits: Limits): GpuArenas {
  const { stage, buffers, chunks } = own.program;
  const { memory } = own;
  for (const b of buffers)
    if (bytesOfBuffer(b) > limits.binding)
      throw new Trouble(
        `the buffer ${b.id} of stage ${stage} has ${bytesOfBuffer(b)} bytes; kernels on ${gpu.adapter} see at most ${limits.binding} of one buffer (maxStorageBufferBindingSize)`,
        "make a rank's share smaller (more of parallel.tensor, a smaller train.micro_batch), or run the plan on a GPU with a higher limit",
        3,
      );

  /** Returns the parts of an arena copy, ascending, split if the limit requires it. */
  const arena = (kind: BufferKind, total: number, copy = "", chunk = 0): ArenaSegment[] => {
    const held = buffers
      .filter((b) => b.kind === kind && (b.chunk ?? 0) === chunk)
      .map((b) => ({ id: b.id, from: own.offset(b.id), to: own.offset(b.id) + aligned(b) }));
    const starts = cutArena(held, total, limits.buffer, `the ${kind} arena of stage ${stage} on ${gpu.adapter}`);
    return starts.map((from, part) => ({
      label: `${kind}${copy}${starts.length > 1 ? ` part ${part}` : ""}`,
      from,
      bytes: (starts[part + 1] ?? total) - from,
    }));
  };
  const activations = chunks.map(({ copies }, chunk) =>
    Array.from({ length: copies }, (_, copy) =>
      arena(
        "activation",
        itemOf(memory.activation, chunk, "activation arena of chunk"),
        ` of ${chunks.length > 1 ? `chunk ${chunk}, ` : ""}slot ${copy}`,
        chunk,
      ),
    ),
  );
  const single = {
    workspace: arena("workspace", memory.workspace),
    parameter: arena("parameter", memory.parameter),
    gradient: arena("gradient", memory.gradient),
    optimizer: arena("optimizer", memory.optimizer),
  };
  const scratch: ArenaSegment = { label: "scratch", from: 0, bytes: Math.max(ALIGN, Math.ceil(memory.scratch / ALIGN) * ALIGN) };
  const { workspace, parameter, gradient, optimizer } = single;
  // if one GPUBuffer is too small, neighbours share one: first the arenas of most dispatches, last those of the optimizer
  const all = [...activations.flat(2), ...workspace, scratch, ...parameter, ...gradient, ...optimizer];
  const places = new Map<ArenaSegment, BufferRange>();
  for (const shared of shareBuffers(all, limits.buffer)) {
    const label = `rank ${rank} ${shared.map(({ label }) => label).join(", ")}`;
    const buffer = gpu.make(label, bytesOfAll(shared));
    for (const [i, part] of shared.entries()) places.set(part, { buffer, offset: bytesOfAll(shared.slice(0, i)), bytes: part.bytes });
  }

  const placeOf = (part: ArenaSegment): BufferRange => {
    const place = places.get(part);
    if (!place) throw new Error(`rankc: ${part.label} has no GPUBuffer`);
    return place;
  };
  return {
    place(b, copy) {
      const parts = b.kind === "activation" ? itemOf(itemOf(activations, b.chunk ?? 0, "chunk"), copy, "activation copy") : single[b.kind];
      const at = own.offset(b.id);
      const part = itemOf(
        parts,
        parts.findLastIndex(({ from }) => from <= at),
        "arena part",
      );
      const { buffer, offset } = placeOf(part);
      return { buffer, offset: offset + at - part.from, bytes: bytesOfBuffer(b) };
    },
    gradients: gradient.map(placeOf),
    scratch: placeOf(scratch),
  };
}

/** A part of an arena within one GPUBuffer. */
interface ArenaSegment {
  readonly label: string;
  /** The start within the arena, in bytes. */
  readonly from: number;
  readonly bytes: number;
}

/** Groups consecutive parts into GPUBuffers up to the limit. */
export function shareBuffers<T extends { readonly bytes: number }>(parts: readonly T[], limit: number): T[][] {
  const all: T[][] = [];
  for (const part of parts) {
    const last = all.at(-1);
    if (last && bytesOfAll(last) + part.bytes <= limit) last.push(part);
    else all.push([part]);
  }
  return all;
}
const bytesOfAll = (parts: readonly { readonly bytes: number }[]): number => parts.reduce((sum, { bytes }) => sum + bytes, 0);

/** Alignment in bytes of buffers in a plan, and of binding offsets. */
const ALIGN = 256;
const aligned = (b: Buffer): number => Math.max(ALIGN, Math.ceil(bytesOfBuffer(b) / ALIGN) * ALIGN);

/**
 * Returns the starts of the parts of an arena: no part exceeds `limit`, no buffer is split, and parts are as large as possible. Throws a
 * Trouble if overlapping buffers make that impossible.
 */
export function cutArena(held: readonly { id: string; from: number; to: number }[], bytes: number, limit: number, what: string): number[] {
  if (bytes === 0) return [];
  if (bytes <= limit) return [0];
  const starts = [0];
  /** The start of the last part. */
  let start = 0;
  let end = 0;
  let boundary = 0;
  for (const b of [...held].sort((x, y) => x.from - y.from)) {
    // no earlier buffer overlaps this one
    if (b.from >= end) boundary = b.from;
    end = Math.max(end, b.to);
    if (end - start > limit && boundary > start) {
      start = boundary;
      starts.push(start);
    }
    if (end - start > limit)
      throw new Trouble(
        `${what} has ${bytes} bytes; its buffers up to ${b.id} lie in one piece, and the device makes none above ${limit} bytes (maxBufferSize)`,
        "make a rank's share smaller (more ranks, a smaller train.micro_batch), or run the plan on a GPU with a higher limit",
        3,
      );
  }
  return starts;
}
