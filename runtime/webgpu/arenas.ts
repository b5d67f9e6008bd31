/**
 * The memory of one rank on the device: every buffer of its program at the place the plan gives it, in one GPUBuffer per
 * arena and per copy of the activations; in several where the device makes none that large. No buffer lies in two.
 */
import { bytesOf, elementsOf, stageOfRank } from "../../schemas/layout.ts";
import type { Buffer, Kind, Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { Gpu } from "./device.ts";

/** Bytes on the device. */
export interface Place {
  readonly buffer: GPUBuffer;
  readonly offset: number;
  readonly bytes: number;
}

/** Bytes: the largest GPUBuffer, and the largest part of one that a kernel may see. */
export interface Limits {
  readonly buffer: number;
  readonly binding: number;
}

export interface Arenas {
  place(b: Buffer, slot: number): Place;
  /** All of the gradients and accumulators: zero when a step begins. */
  readonly gradients: readonly Place[];
  readonly scratch: Place;
}

export const bytesOfBuffer = (b: Buffer): number => bytesOf[b.dtype] * elementsOf(b.shape);

export function makeArenas(gpu: Gpu, plan: Plan, rank: number, limits: Limits): Arenas {
  const stage = stageOfRank(plan.mesh, rank);
  const { buffers, chunks } = plan.programs[stage]!;
  const memory = plan.memory[stage]!;
  for (const b of buffers)
    if (bytesOfBuffer(b) > limits.binding)
      throw new Trouble(
        `the buffer ${b.id} of stage ${stage} has ${bytesOfBuffer(b)} bytes; kernels on ${gpu.adapter} see at most ${limits.binding} of one buffer (maxStorageBufferBindingSize)`,
        "make a rank's share smaller (more of parallel.tensor, a smaller train.micro_batch), or run the plan on a GPU with a higher limit",
        3,
      );

  /** One copy of an arena, cut where the limit demands it: where each part begins, ascending. */
  const arena = (kind: Kind, total: number, copy = "", chunk = 0): { from: number; buffer: GPUBuffer }[] => {
    const own = buffers
      .filter((b) => b.kind === kind && (b.chunk ?? 0) === chunk)
      .map((b) => ({ id: b.id, from: memory.offsets[b.id]!, to: memory.offsets[b.id]! + aligned(b) }));
    const starts = cutArena(own, total, limits.buffer, `the ${kind} arena of stage ${stage} on ${gpu.adapter}`);
    return starts.map((from, part) => {
      const label = `rank ${rank} ${kind}${copy}${starts.length > 1 ? ` part ${part}` : ""}`;
      return { from, buffer: gpu.make(label, (starts[part + 1] ?? total) - from) };
    });
  };
  const single = {
    parameter: arena("parameter", memory.parameter),
    gradient: arena("gradient", memory.gradient),
    optimizer: arena("optimizer", memory.optimizer),
    workspace: arena("workspace", memory.workspace),
  };
  const activations = chunks.map(({ slots }, chunk) =>
    Array.from({ length: slots }, (_, slot) =>
      arena("activation", memory.activation[chunk]!, ` of ${chunks.length > 1 ? `chunk ${chunk}, ` : ""}slot ${slot}`, chunk),
    ),
  );
  const scratchBytes = Math.max(ALIGN, memory.scratch);
  const scratch = { buffer: gpu.make(`rank ${rank} scratch`, scratchBytes), offset: 0, bytes: scratchBytes };

  return {
    place(b, slot) {
      const parts = b.kind === "activation" ? activations[b.chunk ?? 0]![slot]! : single[b.kind];
      const at = memory.offsets[b.id]!;
      const part = parts.findLast(({ from }) => from <= at)!;
      return { buffer: part.buffer, offset: at - part.from, bytes: bytesOfBuffer(b) };
    },
    gradients: single.gradient.map(({ buffer }) => ({ buffer, offset: 0, bytes: buffer.size })),
    scratch,
  };
}

/** Places are multiples of this many bytes apart: the plan's promise, and what a binding's offset needs. */
const ALIGN = 256;
const aligned = (b: Buffer): number => Math.max(ALIGN, Math.ceil(bytesOfBuffer(b) / ALIGN) * ALIGN);

/**
 * Where the parts of an arena begin, so that none is larger than `limit` and no buffer lies in two. Parts are as large as
 * they can be; buffers that share bytes at different times may tie the arena together, and then it cannot be cut.
 */
export function cutArena(held: readonly { id: string; from: number; to: number }[], bytes: number, limit: number, what: string): number[] {
  if (bytes === 0) return [];
  if (bytes <= limit) return [0];
  const starts = [0];
  let end = 0;
  let seam = 0;
  for (const b of [...held].sort((x, y) => x.from - y.from)) {
    // nothing before this buffer reaches into it
    if (b.from >= end) seam = b.from;
    end = Math.max(end, b.to);
    if (end - starts.at(-1)! > limit && seam > starts.at(-1)!) starts.push(seam);
    if (end - starts.at(-1)! > limit)
      throw new Trouble(
        `${what} has ${bytes} bytes; its buffers up to ${b.id} lie in one piece, and the device makes none above ${limit} bytes (maxBufferSize)`,
        "make a rank's share smaller (more ranks, a smaller train.micro_batch), or run the plan on a GPU with a higher limit",
        3,
      );
  }
  return starts;
}
