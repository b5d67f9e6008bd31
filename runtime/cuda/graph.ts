/**
 * Steps as CUDA graphs. The first step is issued call by call, so that NCCL connects and modules load; the second is captured; later steps
 * launch the graph. The host writes inputs to pinned memory, one block per write of a step, which the graph's copies read. Another number
 * of microbatches replaces the graph, because batch sizes only grow.
 */
import type { Buffer } from "../../schemas/plan.ts";
import type { StepKind } from "../backend.ts";
import type { Context, Event, ExecutableGraph, Pinned, Stream } from "./driver.ts";

/** issue: calls execute on the device. capture: calls are recorded into the graph. replay: the graph contains the calls. */
export type Mode = "issue" | "capture" | "replay";

/** The smallest allocation of pinned memory in bytes: page-locking costs far more than a write. */
const pinnedAtOnce = 1 << 20;

/** A piece of pinned memory: its address, and where it begins in memory of the host. */
interface Staged {
  readonly at: bigint;
  readonly memory: ArrayBuffer;
  readonly offset: number;
}
/** A write of an input in a step. */
interface Write extends Staged {
  readonly buffer: Buffer;
  readonly copy: number;
  readonly bytes: number;
}
/** Events of the begin and the end of a replay. */
interface Replay {
  readonly began: Event;
  readonly ended: Event;
}

/**
 * The step controller of a rank. With `graph: false` it issues every step call by call. Training steps, those with instructions of logged steps, and
 * batches of an evaluation have graphs of their own.
 */
export class Steps {
  readonly #recordings: Readonly<Record<StepKind, Recording>>;
  #current: Recording | undefined;

  constructor(context: Context, stream: Stream, settings: { readonly graph: boolean }) {
    const recording = (): Recording => new Recording(context, stream, settings);
    this.#recordings = { training: recording(), logged: recording(), evaluation: recording() };
  }

  /** The mode of the current step; undefined between steps. */
  get mode(): Mode | undefined {
    return this.#current?.mode;
  }

  /** Begins a step with so many microbatches. */
  begin(microbatches: number, kind: StepKind = "training"): Mode {
    // the device does not wait for the host during other work
    if (kind !== "training") this.#recordings.training.interrupt();
    this.#current = this.#recordings[kind];
    return this.#current.begin(microbatches);
  }

  /** Returns the pinned memory of the next write. Every step of a kind must make the same writes. */
  write(buffer: Buffer, copy: number, bytes: number): Staged {
    if (!this.#current) throw new Error(`rankc: ${buffer.id} is written before the first step`);
    return this.#current.write(buffer, copy, bytes);
  }

  /** Ends the step; all its work is then issued. */
  end(): void {
    this.#current?.end();
  }

  /** Returns the fraction of the time between two completed replays of training steps in which the device waited for the host. */
  idle(): number | undefined {
    return this.#recordings.training.idle();
  }

  close(): void {
    for (const recording of Object.values(this.#recordings)) recording.close();
  }
}

/** The steps of one kind. */
class Recording {
  readonly #context: Context;
  readonly #stream: Stream;
  readonly #wanted: boolean;
  readonly #pool: PinnedPool;
  #steps = 0;
  #mode: Mode | undefined;
  #graph: ExecutableGraph | undefined;
  #microbatches: number | undefined;
  /** Whether `#writes` are of an earlier step, whose sequence this step must repeat. */
  #known = false;
  #writes: Write[] = [];
  #next = 0;
  /** The last two replays. */
  #replays: readonly Replay[] = [];

  constructor(context: Context, stream: Stream, { graph }: { readonly graph: boolean }) {
    this.#context = context;
    this.#stream = stream;
    this.#wanted = graph;
    this.#pool = new PinnedPool(context);
  }

  /** The mode of the current step; undefined between steps. */
  get mode(): Mode | undefined {
    return this.#mode;
  }

  /** Begins a step with so many microbatches. */
  begin(microbatches: number): Mode {
    this.#steps++;
    this.#next = 0;
    if (microbatches !== this.#microbatches) this.#forget();
    this.#microbatches = microbatches;
    const mode = this.#graph ? "replay" : this.#wanted && this.#known ? "capture" : "issue";
    this.#mode = mode;
    if (mode === "capture") this.#context.beginCapture(this.#stream);
    return mode;
  }

  /** Returns the pinned memory of the next write. Every step must make the same writes. */
  write(buffer: Buffer, copy: number, bytes: number): Staged {
    const before = this.#writes[this.#next];
    if (before && (before.buffer !== buffer || before.copy !== copy || before.bytes !== bytes))
      throw new Error(
        `rankc: write ${this.#next} of step ${this.#steps} is ${buffer.id} (slot ${copy}), and was ${before.buffer.id} (slot ${before.copy})`,
      );
    if (!before && this.#known) throw new Error(`rankc: step ${this.#steps} writes ${buffer.id}, and steps before it did not`);
    const write = before ?? { buffer, copy, bytes, ...this.#pool.take(bytes) };
    if (!before) this.#writes.push(write);
    this.#next++;
    return write;
  }

  /** Ends the step; all its work is then issued. */
  end(): void {
    const context = this.#context;
    const stream = this.#stream;
    if (this.#next !== this.#writes.length)
      throw new Error(`rankc: step ${this.#steps} wrote ${this.#next} of ${this.#writes.length} inputs`);
    this.#known = true;
    if (this.#mode === "capture") this.#graph = context.endCapture(stream);
    this.#mode = undefined;
    if (!this.#graph) return;
    const [before, last] = this.#replays;
    const now = last && before ? before : { began: context.createEvent(), ended: context.createEvent() };
    this.#replays = last ? [last, now] : before ? [before, now] : [now];
    context.record(now.began, stream);
    context.replay(this.#graph, stream);
    context.record(now.ended, stream);
  }

  /** Returns the fraction of the time between two completed replays in which the device waited for the host. */
  idle(): number | undefined {
    const [before, now] = this.#replays;
    if (!before || !now) return undefined;
    const period = this.#context.elapsed(before.began, now.began);
    return 1 - this.#context.elapsed(before.began, before.ended) / period;
  }

  /** Forgets the times of replays: other work runs before the next. */
  interrupt(): void {
    for (const { began, ended } of this.#replays) for (const event of [began, ended]) this.#context.destroyEvent(event);
    this.#replays = [];
  }

  close(): void {
    this.interrupt();
    if (this.#graph) this.#context.destroyGraph(this.#graph);
    this.#pool.close();
  }

  /** Destroys the graph when no step uses it, and recycles its pinned memory. */
  #forget(): void {
    if (this.#graph) this.#context.destroyGraph(this.#graph);
    this.#graph = undefined;
    this.#writes = [];
    this.#known = false;
    this.#pool.recycle();
  }
}

/** Pinned memory that is handed out piece by piece. */
class PinnedPool {
  readonly #context: Context;
  readonly #blocks: Pinned[] = [];
  /** Bytes of the last block that are in use. */
  #used = 0;

  constructor(context: Context) {
    this.#context = context;
  }

  take(bytes: number): Staged {
    const aligned = Math.ceil(bytes / 16) * 16;
    const block = this.#blockWith(aligned);
    const offset = this.#used;
    this.#used += aligned;
    return { at: block.at + BigInt(offset), memory: block.bytes, offset };
  }

  /** Takes back all pieces, and keeps the first block. */
  recycle(): void {
    const [first, ...others] = this.#blocks.splice(0);
    for (const memory of others) this.#context.unpin(memory);
    if (first) this.#blocks.push(first);
    this.#used = 0;
  }

  close(): void {
    for (const memory of this.#blocks) this.#context.unpin(memory);
  }

  #blockWith(bytes: number): Pinned {
    const last = this.#blocks.at(-1);
    if (last && this.#used + bytes <= last.bytes.byteLength) return last;
    const block = this.#context.pin(Math.max(bytes, pinnedAtOnce));
    this.#blocks.push(block);
    this.#used = 0;
    return block;
  }
}
