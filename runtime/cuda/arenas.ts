/**
 * Arenas: the device memory of one rank, one allocation per buffer kind, with buffers at the plan's offsets. If the device has too little
 * memory, the error with the sizes comes before any allocation.
 */

import { bytesOf, type Dtype } from "../../schemas/dtypes.ts";
import type { BufferKind, Plan } from "../../schemas/plan.ts";
import { activationBytes, activationStart, writtenFirst } from "../../schemas/program.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { RankPrograms } from "../rankPrograms.ts";
import type { Context, DevicePointer, Stream } from "./driver.ts";
import type { Span } from "./streams.ts";

/** The device range of a buffer. */
export interface DeviceRange {
  readonly at: DevicePointer;
  /** Number of elements. */
  readonly count: number;
  readonly bytes: number;
  readonly dtype: Dtype;
  readonly span: Span;
}
/** The open arenas of a rank. */
export type CudaArenas = ReturnType<typeof openArenas>;

const kinds = ["parameter", "gradient", "optimizer", "activation", "workspace"] as const satisfies readonly BufferKind[];

/** Allocates the arenas and zeroes them on `stream`. `beside`: bytes that the caller allocates in addition. Throws a Trouble (exit 3) if they do not fit. */
export function openArenas(context: Context, plan: Plan, rank: number, beside: number, stream: Stream) {
  const stage = new RankPrograms(plan).of(rank);
  const { program, memory } = stage;
  const { free, total } = context.memory();
  const needed = memory.peak + beside;
  if (needed > free) {
    const { ordinal, name } = context.device;
    throw new Trouble(
      `rank ${rank} needs ${gib(needed)} of device ${ordinal} (${name}): ${gib(free)} of its ${gib(total)} are free`,
      "see with nvidia-smi who holds the rest; or compile for more ranks, a smaller train.micro_batch, or recomputation",
      3,
    );
  }
  const sizes = {
    ...Object.fromEntries(kinds.map((kind) => [kind, kind === "activation" ? activationBytes(program, memory) : memory[kind]])),
    scratch: memory.scratch,
  } as Record<BufferKind | "scratch", number>;
  const bases = Object.fromEntries(
    Object.entries(sizes).map(([kind, bytes]) => {
      const at = bytes > 0 ? context.alloc(bytes) : (0n as DevicePointer);
      if (bytes > 0) context.fillIn(at, 0, bytes, stream);
      return [kind, at];
    }),
  ) as Record<BufferKind | "scratch", DevicePointer>;
  const written = writtenFirst(program);
  const ends = program.buffers
    .filter((b) => b.kind === "gradient" && b.within === undefined && !written.has(b.id))
    .map((b) => stage.offset(b.id) + elementsOf(b.shape) * bytesOf[b.dtype]);
  const zeroed = Math.max(0, ...ends);
  const spanOf = (at: DevicePointer, bytes: number): Span => [Number(at), Number(at) + bytes];

  return {
    place(id: string, copy: number): DeviceRange {
      const b = stage.buffer(id);
      const count = elementsOf(b.shape);
      const bytes = count * bytesOf[b.dtype];
      const at = offsetPointer(bases[b.kind], stage.offset(id) + (b.kind === "activation" ? activationStart(program, memory, b, copy) : 0));
      return { at, count, bytes, dtype: b.dtype, span: spanOf(at, bytes) };
    },
    /** The part of the gradient arena that must be zero before a step: up to the last gradient that no first kernel writes. */
    zeroed: { at: bases.gradient, bytes: zeroed, span: spanOf(bases.gradient, zeroed) },
    scratch: (offset: number): DevicePointer => offsetPointer(bases.scratch, offset),
    close(): void {
      for (const [kind, bytes] of Object.entries(sizes)) if (bytes > 0) context.free(bases[kind as BufferKind]);
    },
  };
}

/** Returns a pointer plus an offset in bytes. */
export const offsetPointer = (at: DevicePointer, bytes: number): DevicePointer => (at + BigInt(bytes)) as DevicePointer;
const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;
