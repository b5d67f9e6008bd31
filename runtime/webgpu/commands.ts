/**
 * The one queue of commands of a device: what is recorded is done in order. Commands are collected into few submissions;
 * host writes join them in order, and only reading waits.
 */
/// <reference types="@webgpu/types" />
import type { BufferRange } from "./arenas.ts";
import { type Gpu, mapRead, usage } from "./device.ts";

/** A dispatch with its buffers bound, made once and recorded many times. */
export interface Dispatch {
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly grid: readonly [number, number, number];
  readonly of: Origin;
}
export interface Origin {
  readonly rank: number;
  /** The instruction's. */
  readonly id: string;
  readonly op: string;
  readonly kernel: string;
}
/** When a dispatch ran: microseconds on the device's clock, 0 at the first dispatch that was timed. */
export interface DispatchTiming extends Origin {
  readonly stream: "compute";
  readonly begin_us: number;
  readonly end_us: number;
}

export interface Commands {
  dispatch(d: Dispatch): void;
  /** As many bytes as the destination holds; between two GPUBuffers. */
  copy(from: BufferRange, to: BufferRange): void;
  clear(place: BufferRange): void;
  write(place: BufferRange, data: ArrayBufferView): void;
  /** Copies of what the places hold when all that was recorded before is done. */
  read(places: readonly BufferRange[]): Promise<ArrayBuffer[]>;
  /** Waits until all that was recorded is done. */
  finish(): Promise<void>;
  /** What was timed since the last time this was asked. */
  timings(): Promise<DispatchTiming[]>;
}

/** Dispatches in one submission: enough that submitting costs next to nothing, few enough that the device starts early. */
const BATCH = 256;
/** Bytes of host writes in flight; a larger one is a submission of its own. */
const UPLOADS = 1 << 20;
/** Dispatches timed by one query set; WebGPU allows 4096 queries. */
const TIMED = 2048;

export function commandsOn(gpu: Gpu, { timed }: { timed: boolean }): Commands {
  const { device } = gpu;
  const uploads = device.createBuffer({ label: "host writes", size: UPLOADS, usage: usage.copySource | usage.copyTarget });
  const times = timed && device.features.has("timestamp-query") ? timer(gpu) : undefined;
  let uploaded = 0;
  let pending = 0;
  let encoder: GPUCommandEncoder | undefined;
  let pass: GPUComputePassEncoder | undefined;
  /** What the pass has set: each call costs about a microsecond of the host. */
  let pipelineSet: GPUComputePipeline | undefined;
  let groupSet: GPUBindGroup | undefined;

  const recorder = (): GPUCommandEncoder => (encoder ??= device.createCommandEncoder());
  /** Copies stand between passes. */
  const between = (): GPUCommandEncoder => {
    pass?.end();
    pass = pipelineSet = groupSet = undefined;
    return recorder();
  };
  function submit(): void {
    if (!encoder) return;
    times?.resolve(between());
    device.queue.submit([between().finish()]);
    times?.submitted();
    encoder = undefined;
    pending = 0;
    // what is written from now on is written after what was submitted
    uploaded = 0;
  }

  return {
    dispatch({ pipeline, group, grid, of }) {
      pass ??= recorder().beginComputePass(times?.next(of));
      if (pipeline !== pipelineSet) pass.setPipeline((pipelineSet = pipeline));
      if (group !== groupSet) pass.setBindGroup(0, (groupSet = group));
      if (grid[1] === 1 && grid[2] === 1) pass.dispatchWorkgroups(grid[0]);
      else pass.dispatchWorkgroups(grid[0], grid[1], grid[2]);
      // times are those of a pass
      if (times) between();
      if (++pending === BATCH || times?.full()) submit();
    },
    copy(from, to) {
      between().copyBufferToBuffer(from.buffer, from.offset, to.buffer, to.offset, words(to.bytes));
    },
    clear({ buffer, offset, bytes }) {
      between().clearBuffer(buffer, offset, words(bytes));
    },
    write({ buffer, offset }, data) {
      const bytes = inWords(data);
      if (bytes.length > UPLOADS / 4) {
        submit();
        device.queue.writeBuffer(buffer, offset, bytes);
        return;
      }
      if (uploaded + bytes.length > UPLOADS) submit();
      device.queue.writeBuffer(uploads, uploaded, bytes);
      between().copyBufferToBuffer(uploads, uploaded, buffer, offset, bytes.length);
      uploaded += bytes.length;
    },
    async read(places) {
      gpu.check();
      const sizes = places.map(({ bytes }) => words(bytes));
      const total = sizes.reduce((sum, n) => sum + n, 0);
      if (total === 0) return [];
      const staging = device.createBuffer({ label: "host reads", size: total, usage: usage.mapRead | usage.copyTarget });
      let at = 0;
      for (const [i, { buffer, offset }] of places.entries()) {
        between().copyBufferToBuffer(buffer, offset, staging, at, sizes[i]!);
        at += sizes[i]!;
      }
      submit();
      try {
        await gpu.done(staging.mapAsync(mapRead));
        const mapped = staging.getMappedRange();
        at = 0;
        return places.map(({ bytes }, i) => {
          const copy = mapped.slice(at, at + bytes);
          at += sizes[i]!;
          return copy;
        });
      } finally {
        staging.destroy();
      }
    },
    async finish() {
      submit();
      await gpu.done(device.queue.onSubmittedWorkDone());
    },
    async timings() {
      submit();
      return (await times?.taken()) ?? [];
    },
  };
}

/** Copies move whole words; the plan's places leave room for it. */
const words = (bytes: number): number => Math.ceil(bytes / 4) * 4;

function inWords(data: ArrayBufferView): Uint8Array<ArrayBufferLike> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  if (bytes.length % 4 === 0) return bytes;
  const padded = new Uint8Array(words(bytes.length));
  padded.set(bytes);
  return padded;
}

/** Takes the times of passes: a query set per submission's worth, resolved with it, read when asked for. */
function timer(gpu: Gpu) {
  const { device } = gpu;
  const queries = device.createQuerySet({ type: "timestamp", count: 2 * TIMED });
  const resolved = device.createBuffer({ label: "times", size: 16 * TIMED, usage: usage.queryResolve | usage.copySource });
  let open: Origin[] = [];
  let sent: { origins: Origin[]; staging: GPUBuffer }[] = [];
  let staging: GPUBuffer | undefined;
  let zero: bigint | undefined;
  return {
    next(of: Origin): GPUComputePassDescriptor {
      const at = 2 * (open.push(of) - 1);
      return { timestampWrites: { querySet: queries, beginningOfPassWriteIndex: at, endOfPassWriteIndex: at + 1 } };
    },
    full: () => open.length === TIMED,
    resolve(encoder: GPUCommandEncoder): void {
      if (!open.length) return;
      const bytes = 16 * open.length;
      staging = device.createBuffer({ label: "times", size: bytes, usage: usage.mapRead | usage.copyTarget });
      encoder.resolveQuerySet(queries, 0, 2 * open.length, resolved, 0);
      encoder.copyBufferToBuffer(resolved, 0, staging, 0, bytes);
    },
    submitted(): void {
      if (!staging) return;
      sent.push({ origins: open, staging });
      open = [];
      staging = undefined;
    },
    async taken(): Promise<DispatchTiming[]> {
      const all = sent;
      sent = [];
      const timings: DispatchTiming[] = [];
      for (const { origins, staging } of all) {
        await gpu.done(staging.mapAsync(mapRead));
        const ns = new BigUint64Array(staging.getMappedRange().slice(0));
        staging.destroy();
        zero ??= ns[0]!;
        const us = (i: number) => Number(ns[i]! - zero!) / 1000;
        timings.push(...origins.map((of, i) => ({ ...of, stream: "compute" as const, begin_us: us(2 * i), end_us: us(2 * i + 1) })));
      }
      return timings;
    },
  };
}
