/**
 * The command queue of a device. Commands execute in the order of the calls. They are collected into few submissions, together with
 * writes of the host; only reads wait.
 */
/// <reference types="@webgpu/types" />
import type { BufferRange } from "./arenas.ts";
import { type Gpu, mapRead, usage } from "./device.ts";

/** A dispatch with bound buffers; created once and recorded many times. */
export interface Dispatch {
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly grid: readonly [number, number, number];
  readonly of: Origin;
}
/** The instruction that a dispatch belongs to. */
export interface Origin {
  readonly rank: number;
  /** The id of the instruction. */
  readonly id: string;
  readonly op: string;
  readonly kernel: string;
}
/** The time of a dispatch in microseconds of the device's clock; 0 is the begin of the first timed dispatch. */
export interface DispatchTiming extends Origin {
  readonly stream: "compute";
  readonly begin_us: number;
  readonly end_us: number;
}

/** The commands of a device. */
export interface Commands {
  dispatch(d: Dispatch): void;
  /** Copies as many bytes as the destination holds, between two GPUBuffers. */
  copy(from: BufferRange, to: BufferRange): void;
  clear(place: BufferRange): void;
  write(place: BufferRange, data: ArrayBufferView): void;
  /** Returns copies of the ranges, after all commands recorded before. */
  read(ranges: readonly BufferRange[]): Promise<ArrayBuffer[]>;
  /** Waits until all recorded commands are complete. */
  finish(): Promise<void>;
  /** Returns the times recorded since the last call. */
  timings(): Promise<DispatchTiming[]>;
}

/** Dispatches per submission: enough to make the cost of a submission small, few enough that the device starts early. */
const BATCH = 256;
/** Bytes of host writes per submission; a write of more than a quarter goes to the queue directly. */
const UPLOADS = 1 << 20;
/** Dispatches timed by one query set; WebGPU allows 4096 queries. */
const TIMED = 2048;

/** Opens the command queue of a device. `timed`: record the time of every dispatch, if the device can. */
export const commandsOn = (gpu: Gpu, { timed }: { timed: boolean }): Commands => new CommandQueue(gpu, timed);

class CommandQueue implements Commands {
  readonly #gpu: Gpu;
  readonly #device: GPUDevice;
  readonly #uploads: GPUBuffer;
  readonly #times: ReturnType<typeof timer> | undefined;
  /** Bytes of `#uploads` that the open submission uses. */
  #uploaded = 0;
  #pending = 0;
  #encoder: GPUCommandEncoder | undefined;
  #pass: GPUComputePassEncoder | undefined;
  /** State of the pass, to omit calls that change nothing: each costs about a microsecond of the host. */
  #pipelineSet: GPUComputePipeline | undefined;
  #groupSet: GPUBindGroup | undefined;

  constructor(gpu: Gpu, timed: boolean) {
    const { device } = gpu;
    this.#gpu = gpu;
    this.#device = device;
    this.#uploads = device.createBuffer({ label: "host writes", size: UPLOADS, usage: usage.copySource | usage.copyTarget });
    this.#times = timed && device.features.has("timestamp-query") ? timer(gpu) : undefined;
  }

  dispatch({ pipeline, group, grid, of }: Dispatch): void {
    const pass = (this.#pass ??= this.#recorder().beginComputePass(this.#times?.next(of)));
    if (pipeline !== this.#pipelineSet) pass.setPipeline((this.#pipelineSet = pipeline));
    if (group !== this.#groupSet) pass.setBindGroup(0, (this.#groupSet = group));
    if (grid[1] === 1 && grid[2] === 1) pass.dispatchWorkgroups(grid[0]);
    else pass.dispatchWorkgroups(grid[0], grid[1], grid[2]);
    // a time is that of a pass
    if (this.#times) this.#betweenPasses();
    if (++this.#pending === BATCH || this.#times?.full()) this.#submit();
  }

  copy(from: BufferRange, to: BufferRange): void {
    this.#betweenPasses().copyBufferToBuffer(from.buffer, from.offset, to.buffer, to.offset, words(to.bytes));
  }

  clear({ buffer, offset, bytes }: BufferRange): void {
    this.#betweenPasses().clearBuffer(buffer, offset, words(bytes));
  }

  write({ buffer, offset }: BufferRange, data: ArrayBufferView): void {
    const bytes = inWords(data);
    if (bytes.length > UPLOADS / 4) {
      this.#submit();
      this.#device.queue.writeBuffer(buffer, offset, bytes);
      return;
    }
    if (this.#uploaded + bytes.length > UPLOADS) this.#submit();
    this.#device.queue.writeBuffer(this.#uploads, this.#uploaded, bytes);
    this.#betweenPasses().copyBufferToBuffer(this.#uploads, this.#uploaded, buffer, offset, bytes.length);
    this.#uploaded += bytes.length;
  }

  async read(ranges: readonly BufferRange[]): Promise<ArrayBuffer[]> {
    this.#gpu.check();
    let total = 0;
    const placed = ranges.map((range) => {
      const at = total;
      total += words(range.bytes);
      return { range, at };
    });
    if (total === 0) return [];
    const staging = this.#device.createBuffer({ label: "host reads", size: total, usage: usage.mapRead | usage.copyTarget });
    for (const { range, at } of placed)
      this.#betweenPasses().copyBufferToBuffer(range.buffer, range.offset, staging, at, words(range.bytes));
    this.#submit();
    try {
      await this.#gpu.done(staging.mapAsync(mapRead));
      const mapped = staging.getMappedRange();
      return placed.map(({ range, at }) => mapped.slice(at, at + range.bytes));
    } finally {
      staging.destroy();
    }
  }

  async finish(): Promise<void> {
    this.#submit();
    await this.#gpu.done(this.#device.queue.onSubmittedWorkDone());
  }

  async timings(): Promise<DispatchTiming[]> {
    this.#submit();
    return (await this.#times?.taken()) ?? [];
  }

  #recorder(): GPUCommandEncoder {
    return (this.#encoder ??= this.#device.createCommandEncoder());
  }

  /** Ends the open pass: WebGPU records copies between passes only. */
  #betweenPasses(): GPUCommandEncoder {
    this.#pass?.end();
    this.#pass = this.#pipelineSet = this.#groupSet = undefined;
    return this.#recorder();
  }

  #submit(): void {
    if (!this.#encoder) return;
    this.#times?.resolve(this.#betweenPasses());
    this.#device.queue.submit([this.#betweenPasses().finish()]);
    this.#times?.submitted();
    this.#encoder = undefined;
    this.#pending = 0;
    // later writes to `#uploads` execute after this submission
    this.#uploaded = 0;
  }
}

/** Rounds up to whole words, as WebGPU copies them; the plan's offsets leave room for it. */
const words = (bytes: number): number => Math.ceil(bytes / 4) * 4;

function inWords(data: ArrayBufferView): Uint8Array<ArrayBufferLike> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  if (bytes.length % 4 === 0) return bytes;
  const padded = new Uint8Array(words(bytes.length));
  padded.set(bytes);
  return padded;
}

/** Records the times of passes: one query set, resolved with each submission, and read on request. */
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
        zero ??= ns[0] ?? 0n;
        const us = (i: number) => Number(ns[i]! - zero!) / 1000;
        timings.push(...origins.map((of, i) => ({ ...of, stream: "compute" as const, begin_us: us(2 * i), end_us: us(2 * i + 1) })));
      }
      return timings;
    },
  };
}
