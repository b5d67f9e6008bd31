/**
 * The clocks of the streams of one stage. They follow the runtime (runtime/cuda/streams.ts): kernels run on the compute stream; communication
 * runs on streams of its own after all kernels issued before it, beside later kernels, until one of them touches the same bytes. Asynchronous
 * collectives run until an instruction waits for them by their ids, as the plan states.
 */
import type { CommunicationClass, MemorySpan, TimedInstruction } from "./timedBlocks.ts";

type Touch = Pick<TimedInstruction, "reads" | "writes">;

/** Communication that later instructions may have to wait for. Times in seconds on the clock of the stage. */
export interface PendingWork extends Touch {
  /** Of an asynchronous collective, its id: only `await` and `join` wait for it. */
  readonly id?: string;
  readonly stream: string;
  readonly axes: string;
  readonly communication?: CommunicationClass;
  readonly start: number;
  readonly end: number;
  /** How much of the time until `end` was spent waiting for other stages, not for bytes. */
  readonly late: number;
}

/** What the compute stream waited for. */
export interface ClockWait {
  /** Seconds in which the compute stream waited for communication over `axes`, or for other stages. */
  readonly exposed: number;
  readonly axes: string;
  readonly communication?: CommunicationClass;
  readonly idle: number;
}

const meets = (a: readonly MemorySpan[], b: readonly MemorySpan[]): boolean =>
  a.some(([from, to]) => b.some((other) => other[0] < to && from < other[1]));
const conflicts = (a: Touch, b: Touch): boolean => meets(a.writes, b.reads) || meets(a.reads, b.writes);

/** When a kernel ran, and what it waited for before. */
interface RunTime extends ClockWait {
  readonly start: number;
  readonly end: number;
}

/** The clocks of one stage. */
export class StageClock {
  /** When the compute stream is free. */
  compute: number;
  readonly #slowdown: number;
  readonly #streams = new Map<string, number>();
  #pending: PendingWork[];

  /** `slowdown`: the share of its rate that a kernel loses while communication runs. */
  constructor(slowdown: number, start = 0, pending: readonly PendingWork[] = []) {
    this.#slowdown = slowdown;
    this.compute = start;
    this.#pending = [...pending];
    for (const { stream, end } of pending) this.#streams.set(stream, Math.max(end, this.#streams.get(stream) ?? 0));
  }

  /** Communication that has not ended when the compute stream is free. */
  get pending(): readonly PendingWork[] {
    return this.#pending.filter(({ end }) => end > this.compute);
  }

  /** Runs a kernel after the communication that it conflicts with. */
  run(touch: Touch, seconds: number): RunTime {
    const wait = this.#wait((p) => p.id === undefined && conflicts(p, touch));
    const start = this.compute;
    this.compute = this.#endOf(start, seconds);
    return { start, end: this.compute, ...wait };
  }

  /** Makes the compute stream wait for an asynchronous collective, and so for those before it on its stream; none if it has ended. */
  await(id: string): ClockWait {
    const awaited = this.#pending.findLast((p) => p.id === id);
    return this.#wait((p) => p === awaited);
  }

  /** Makes the compute stream wait for all communication. */
  join(): ClockWait {
    return this.#wait(() => true);
  }

  /** Returns when communication could begin: after all kernels so far, its stream, and work of other streams on the same bytes. */
  readyAt(touch: Touch, stream: string): number {
    let ready = Math.max(this.compute, this.#streams.get(stream) ?? 0);
    for (const p of this.#pending) if (p.stream !== stream && p.end > ready && p.id === undefined && conflicts(p, touch)) ready = p.end;
    return ready;
  }

  /** Adds communication whose times are known. */
  add(work: PendingWork): void {
    this.#streams.set(work.stream, work.end);
    this.#pending.push(work);
  }

  #wait(isAwaited: (p: PendingWork) => boolean): ClockWait {
    let last: PendingWork | undefined;
    if (this.#pending.length > 0) {
      this.#pending = this.#pending.filter(({ end }) => end > this.compute);
      for (const p of this.#pending) if (p.end > (last?.end ?? this.compute) && isAwaited(p)) last = p;
    }
    if (!last) return { exposed: 0, axes: "", idle: 0 };
    const waited = last.end - this.compute;
    const idle = Math.min(waited, last.late);
    this.compute = last.end;
    return { exposed: waited - idle, axes: last.axes, ...(last.communication && { communication: last.communication }), idle };
  }

  /** Returns when a kernel ends that has its full rate outside of communication. */
  #endOf(start: number, seconds: number): number {
    const rate = 1 - this.#slowdown;
    const busy = this.#pending.filter(({ end }) => end > start).sort((a, b) => a.start - b.start);
    let [at, left] = [start, seconds];
    for (const { start: from, end: to } of busy) {
      if (to <= at) continue;
      const alone = Math.max(0, from - at);
      if (left <= alone) return at + left;
      [at, left] = [at + alone, left - alone];
      const beside = (to - at) * rate;
      if (left <= beside) return at + left / rate;
      [at, left] = [to, left - beside];
    }
    return at + left;
  }
}
