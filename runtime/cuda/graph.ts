/**
 * Steps as CUDA graphs. The first step is issued call by call, so that NCCL connects and modules load; the second is captured; later steps
 * launch the graph. The graph's copies of inputs read device memory, to which one copy in front of each launch brings them from pinned memory
 * (inputs.ts): so the host writes the inputs of a step while the step before it runs. Another number of microbatches replaces the graph,
 * because batch sizes only grow.
 */
import type { Buffer } from "../../schemas/plan.ts";
import type { StepKind } from "../backend.ts";
import type { Context, Event, ExecutableGraph, Stream } from "./driver.ts";
import { alignedBytes, PinnedPool, ReplayInputs, type Staged } from "./inputs.ts";

/** issue: calls execute on the device. capture: calls are recorded into the graph. replay: the graph contains the calls. */
export type Mode = "issue" | "capture" | "replay";

/** A write of an input in a step. */
interface Write {
  readonly buffer: Buffer;
  readonly copy: number;
  readonly bytes: number;
  /** Where it begins in the inputs of a replay. */
  readonly offset: number;
  /** Where it is written in steps that are issued call by call. */
  readonly issued: Staged;
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

  /** Returns whether a step of so many microbatches is a launch of a graph, which may follow a step under way. */
  isReplayed(microbatches: number, kind: StepKind): boolean {
    return this.#recordings[kind].isReplayed(microbatches);
  }

  /** Returns where the next input is written. Every step of a kind must make the same writes. */
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
  #inputs: ReplayInputs | undefined;
  /** The last three replays: two may be under way. */
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

  isReplayed(microbatches: number): boolean {
    return this.#graph !== undefined && microbatches === this.#microbatches;
  }

  /** Begins a step with so many microbatches. */
  begin(microbatches: number): Mode {
    this.#steps++;
    this.#next = 0;
    if (microbatches !== this.#microbatches) this.#forget();
    this.#microbatches = microbatches;
    const mode = this.#graph ? "replay" : this.#wanted && this.#known ? "capture" : "issue";
    this.#mode = mode;
    if (mode === "capture") {
      // memory is allocated before the capture
      this.#inputs = new ReplayInputs(this.#context, this.#bytes());
      this.#context.beginCapture(this.#stream);
    }
    if (mode !== "issue") this.#inputs?.turn();
    return mode;
  }

  /** Returns where the next input is written. Every step must make the same writes. */
  write(buffer: Buffer, copy: number, bytes: number): Staged {
    const before = this.#writes[this.#next];
    if (before && (before.buffer !== buffer || before.copy !== copy || before.bytes !== bytes))
      throw new Error(
        `rankc: write ${this.#next} of step ${this.#steps} is ${buffer.id} (slot ${copy}), and was ${before.buffer.id} (slot ${before.copy})`,
      );
    if (!before && this.#known) throw new Error(`rankc: step ${this.#steps} writes ${buffer.id}, and steps before it did not`);
    const write = before ?? { buffer, copy, bytes, offset: this.#bytes(), issued: this.#pool.take(bytes) };
    if (!before) this.#writes.push(write);
    this.#next++;
    return this.#mode === "issue" || !this.#inputs ? write.issued : this.#inputs.at(write.offset);
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
    const [oldest, ...later] = this.#replays;
    const isFull = oldest !== undefined && later.length === 2;
    const now = isFull ? oldest : { began: context.createEvent(), ended: context.createEvent() };
    this.#replays = [...(isFull ? later : this.#replays), now];
    context.record(now.began, stream);
    this.#inputs?.issueCopy(stream);
    context.replay(this.#graph, stream);
    context.record(now.ended, stream);
  }

  /** Returns the fraction of the time between the begins of the last two replays that have begun in which the device waited for the host. */
  idle(): number | undefined {
    const begun = this.#replays.filter(({ began }) => this.#context.happened(began));
    const [before, now] = begun.slice(-2);
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
    this.#inputs?.close();
    this.#pool.close();
  }

  /** The bytes of all inputs so far, each aligned. */
  #bytes(): number {
    const last = this.#writes.at(-1);
    return last ? last.offset + alignedBytes(last.bytes) : 0;
  }

  /** Destroys the graph when no step uses it, and recycles its pinned memory. */
  #forget(): void {
    if (this.#graph) this.#context.destroyGraph(this.#graph);
    this.#inputs?.close();
    this.#graph = undefined;
    this.#inputs = undefined;
    this.#writes = [];
    this.#known = false;
    this.#pool.recycle();
  }
}
