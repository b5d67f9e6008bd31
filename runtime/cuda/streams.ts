/**
 * The streams of one rank. Kernels run on the compute stream; communication runs on other streams, concurrently with later kernels, until
 * one of them accesses the same bytes. Asynchronous collectives run until an instruction waits for them, as the plan states and
 * `verifyStreams` has proved sufficient. The results equal those of the plan's order.
 */
import type { Context, Event, Stream } from "./driver.ts";

/** Bytes of device memory, [begin, end). */
export type Span = readonly [number, number];
/** The device memory that a piece of work reads and writes. */
export interface Touch {
  readonly reads: readonly Span[];
  readonly writes: readonly Span[];
}
/** The name of a piece of work in a profile. */
export interface Label {
  readonly id: string;
  readonly op: string;
  /** The kernel id; empty for other work. */
  readonly kernel: string;
}
/** A named stream. */
export interface RankStream {
  readonly name: string;
  readonly stream: Stream;
}
/** The time of a piece of work, in µs. */
export interface Timed extends Label {
  readonly stream: string;
  readonly begin_us: number;
  readonly end_us: number;
}

interface OwnStream extends RankStream {
  /** The number of compute operations at this stream's last wait for compute. */
  seen: number;
}
interface Pending extends Touch {
  readonly rankStream: OwnStream;
  readonly order: number;
  readonly event: Event;
  /** Of an asynchronous collective, its id: the plan states what waits for it. Other work is awaited by what touches the same bytes. */
  readonly id: string | undefined;
}

/** Which instructions of a step are timed: all, none, or those whose id fulfills the predicate. An event between two kernels delays the second by 1 to 3 µs. */
export type TimedWork = boolean | ((id: string) => boolean);

/** Times of work since the last `begin` with `timedWork`. */
interface Timing {
  readonly wanted: (id: string) => boolean;
  readonly began: Event;
  readonly marks: { readonly label: Label; readonly rankStream: RankStream; readonly from: Event; readonly to: Event }[];
  /** Events of earlier steps, for reuse. */
  readonly spare: Event[];
}
const eventsOf = ({ marks }: Timing): Event[] => marks.flatMap(({ from, to }) => [from, to]);

/** The open streams of a rank. */
export class RankStreams {
  readonly #context: Context;
  readonly #compute: OwnStream;
  readonly #streams: Map<string, OwnStream>;
  readonly #computed: Event;
  /** Work of other streams that compute has not waited for, in issue order. */
  #pending: Pending[] = [];
  readonly #spare: Event[] = [];
  #issued = 0;
  #order = 0;
  #timing: Timing | undefined;

  constructor(context: Context) {
    this.#context = context;
    this.#compute = this.#open("compute");
    this.#streams = new Map([[this.#compute.name, this.#compute]]);
    this.#computed = context.createEvent("order");
  }

  get compute(): RankStream {
    return this.#compute;
  }

  /** Returns a stream by name; creates it on first use. */
  rankStream(name: string): RankStream {
    return this.#own(name);
  }

  /** Issues work on the compute stream. */
  run(touch: Touch, label: Label | undefined, issue: (stream: Stream) => void): void {
    this.#waitFor(this.#compute, touch);
    this.#issued++;
    this.#issueTimed(label, this.#compute, issue);
  }

  /**
   * Issues work on another stream, after all compute issued so far and after conflicting work of other streams. `id`: it is asynchronous,
   * and only `await` and `join` wait for it.
   */
  beside({ name }: RankStream, touch: Touch, label: Label | undefined, issue: (stream: Stream) => void, id?: string): void {
    const own = this.#own(name);
    if (own.seen !== this.#issued) {
      this.#context.record(this.#computed, this.#compute.stream);
      this.#context.wait(own.stream, this.#computed);
      own.seen = this.#issued;
    }
    this.#waitFor(own, touch);
    this.#issueTimed(label, own, issue);
    const done = this.#spare.pop() ?? this.#context.createEvent("order");
    this.#context.record(done, own.stream);
    this.#pending.push({ ...touch, rankStream: own, order: this.#order++, event: done, id });
  }

  /** Makes compute wait for work of another stream by the id of its instruction; work that compute has waited for is complete. */
  await(id: string): void {
    const awaited = this.#pending.findLast((p) => p.id === id);
    if (awaited) this.#wait(this.#compute, new Map([[awaited.rankStream, awaited]]));
  }

  /** Makes compute wait for all other streams. */
  join(): void {
    this.#waitFor(this.#compute, "everything");
  }

  /** Clears completed work, so that a capture does not wait for it. `timedWork`: what is timed from here on. */
  begin(timedWork: TimedWork): void {
    for (const rankStream of this.#streams.values()) rankStream.seen = -1;
    const before = this.#timing;
    const spare = before ? [...before.spare, before.began, ...eventsOf(before)] : [];
    this.#timing = undefined;
    if (timedWork === false) return;
    const wanted = timedWork === true ? () => true : timedWork;
    const began = spare.pop() ?? this.#context.createEvent();
    this.#timing = { wanted, began, marks: [], spare };
    this.#context.record(began, this.#compute.stream);
  }

  /** Returns the times of the timed work since the last `begin`, in issue order. All work must be complete. */
  timed(): Timed[] {
    if (!this.#timing) return [];
    const { began, marks } = this.#timing;
    return marks.map(({ label, rankStream, from, to }) => ({
      ...label,
      stream: rankStream.name,
      begin_us: 1000 * this.#context.elapsed(began, from),
      end_us: 1000 * this.#context.elapsed(began, to),
    }));
  }

  /** Returns the first incomplete timed work since the last `begin`, in issue order. */
  underWay(): Label | undefined {
    return this.#timing?.marks.find(({ to }) => !this.#context.happened(to))?.label;
  }

  close(): void {
    const clocks = this.#timing ? [this.#timing.began, ...this.#timing.spare, ...eventsOf(this.#timing)] : [];
    for (const e of [...this.#spare, ...clocks, ...this.#pending.map((p) => p.event), this.#computed]) this.#context.destroyEvent(e);
    for (const { stream } of this.#streams.values()) this.#context.destroyStream(stream);
  }

  #open(name: string): OwnStream {
    // a collective of several ranks lasts until its last thread block on any rank has begun, and each occupies its multiprocessor until then
    const stream = name === "compute" ? this.#context.createStream() : this.#context.createStream("urgent");
    return { name, stream, seen: -1 };
  }

  #own(name: string): OwnStream {
    const known = this.#streams.get(name) ?? this.#open(name);
    this.#streams.set(name, known);
    return known;
  }

  /** Makes the stream wait for conflicting work of other streams; the last conflict of each stream suffices. */
  #waitFor(rankStream: OwnStream, touch: Touch | "everything"): void {
    const last = new Map<OwnStream, Pending>();
    for (const p of this.#pending)
      if (p.rankStream !== rankStream && (touch === "everything" || (p.id === undefined && conflict(p, touch)))) last.set(p.rankStream, p);
    this.#wait(rankStream, last);
  }

  /** Makes the stream wait for the last of the given work of each stream, and so for all before it there. */
  #wait(rankStream: OwnStream, last: ReadonlyMap<OwnStream, Pending>): void {
    for (const p of last.values()) this.#context.wait(rankStream.stream, p.event);
    if (rankStream !== this.#compute || last.size === 0) return;
    const over = (p: Pending): boolean => p.order <= (last.get(p.rankStream)?.order ?? -1);
    this.#spare.push(...this.#pending.filter(over).map((p) => p.event));
    this.#pending = this.#pending.filter((p) => !over(p));
  }

  /** Issues work; records events around it if it is timed. */
  #issueTimed(label: Label | undefined, rankStream: RankStream, issue: (stream: Stream) => void): void {
    if (!this.#timing || !label || !this.#timing.wanted(label.id)) {
      issue(rankStream.stream);
      return;
    }
    const clock = (spare: Event[]): Event => spare.pop() ?? this.#context.createEvent();
    const [from, to] = [clock(this.#timing.spare), clock(this.#timing.spare)];
    this.#context.record(from, rankStream.stream);
    issue(rankStream.stream);
    this.#context.record(to, rankStream.stream);
    this.#timing.marks.push({ label, rankStream, from, to });
  }
}

const meet = (a: readonly Span[], b: readonly Span[]): boolean => a.some(([from, to]) => b.some((s) => s[0] < to && from < s[1]));
const conflict = (a: Touch, b: Touch): boolean => meet(a.writes, b.reads) || meet(a.writes, b.writes) || meet(a.reads, b.writes);
