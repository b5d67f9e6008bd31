/**
 * The clocks of the streams of one stage. They follow the runtime (runtime/cuda/streams.ts): kernels run on the compute stream; communication
 * runs on streams of its own after all kernels issued before it, beside later kernels, until one of them touches the same bytes. Asynchronous
 * collectives run until an instruction waits for them by their ids, as the plan states.
 */
import type { CommunicationClass, MemorySpan, TimedInstruction } from "./timedBlocks.ts";
import { activities, type PartSums } from "./timeParts.ts";

type Touch = Pick<TimedInstruction, "touch">;

/** Communication that later instructions may have to wait for. Times in seconds on the clock of the stage. */
export interface PendingWork extends Touch {
  /** Of an asynchronous collective, its id: only `await` and `join` wait for it. */
  readonly id?: string;
  readonly stream: string;
  readonly axes: string;
  readonly communication?: CommunicationClass;
  readonly start: number;
  readonly end: number;
  /** The share of its rate that a kernel loses meanwhile; 0 if absent. */
  readonly slowdown?: number;
  /** How much of the time until `end` was spent waiting for other stages, not for bytes. */
  readonly late: number;
}

const meets = (a: readonly MemorySpan[], b: readonly MemorySpan[]): boolean =>
  a.some(([from, to]) => b.some((other) => other[0] < to && from < other[1]));
const conflicts = ({ touch: a }: Touch, { touch: b }: Touch): boolean => meets(a.writes, b.reads) || meets(a.reads, b.writes);

/** The clocks of one stage. */
export class StageClock {
  /** When the compute stream is free. */
  compute: number;
  readonly #parts: PartSums;
  readonly #streams = new Map<string, number>();
  #pending: PendingWork[];

  /** The clock adds to `parts` where the time goes. */
  constructor(parts: PartSums, start = 0, pending: readonly PendingWork[] = []) {
    this.#parts = parts;
    this.compute = start;
    this.#pending = [...pending];
    for (const { stream, end } of pending) this.#streams.set(stream, Math.max(end, this.#streams.get(stream) ?? 0));
  }

  /** Communication that has not ended when the compute stream is free. */
  get pending(): readonly PendingWork[] {
    return this.#pending.filter(({ end }) => end > this.compute);
  }

  /** Runs a kernel after the communication that it conflicts with. Returns its start and end. */
  run(i: TimedInstruction): readonly [number, number] {
    this.#wait((p) => p.id === undefined && conflicts(p, i));
    const start = this.compute;
    const end = this.#endOf(start, i.seconds);
    this.#parts.addKernel(i.part ?? "other kernels", end - start);
    this.#goTo(end, i.instruction.kind === "compute" ? i.instruction.op : i.instruction.kind);
    return [start, end];
  }

  /** Makes the compute stream wait for an asynchronous collective, and so for those before it on its stream; none if it has ended. */
  await(id: string): void {
    const awaited = this.#pending.findLast((p) => p.id === id);
    if (awaited) this.#wait((p) => p === awaited);
  }

  /** Makes the compute stream wait for all communication. */
  join(): void {
    this.#wait(() => true);
  }

  /** Makes the compute stream wait for the host, which is slower. */
  waitForHost(seconds: number): void {
    this.#parts.launches += seconds;
    this.#goTo(this.compute + seconds, activities.launches);
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

  #wait(isAwaited: (p: PendingWork) => boolean): void {
    if (this.#pending.length === 0) return;
    let last: PendingWork | undefined;
    this.#pending = this.#pending.filter(({ end }) => end > this.compute);
    for (const p of this.#pending) if (p.end > (last?.end ?? this.compute) && isAwaited(p)) last = p;
    if (!last) return;
    const { end, stream } = last;
    while (this.compute < end) {
      const at = this.compute;
      const isUnderWay = (p: PendingWork): boolean => p.start + p.late <= at && p.end > at;
      // before it began, its stream ran another one, or it waited for work of another stream on the same bytes
      const charged =
        this.#pending.find((p) => p.stream === stream && isUnderWay(p)) ??
        (at < last.start ? this.#pending.find((p) => isUnderWay(p) && p.end <= end) : undefined);
      if (charged) {
        this.#parts.addExposed(charged.axes, charged.end - at, charged.communication);
        this.#goTo(charged.end, activities.waitsFor(charged.axes), charged);
        continue;
      }
      const begin = this.#pending.reduce((least, p) => (p.start + p.late > at ? Math.min(least, p.start + p.late) : least), end);
      this.#parts.bubble += begin - at;
      this.#goTo(begin, activities.otherStages);
    }
  }

  /** Sets when the compute stream is free, and counts the communication that runs until then, but for `charged`, under an activity. */
  #goTo(time: number, activity: string, charged?: PendingWork): void {
    const from = this.compute;
    for (const p of this.#pending) {
      if (p === charged || !p.communication) continue;
      this.#parts.addHidden(p.communication, activity, Math.min(time, p.end) - Math.max(from, p.start + p.late));
    }
    this.compute = time;
  }

  /** Returns when a kernel ends that has its full rate outside of communication. */
  #endOf(start: number, seconds: number): number {
    const busy = this.#pending.filter(({ end }) => end > start).sort((a, b) => a.start - b.start);
    let [at, left] = [start, seconds];
    for (const { start: from, end: to, slowdown = 0 } of busy) {
      if (to <= at) continue;
      const rate = 1 - slowdown;
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
