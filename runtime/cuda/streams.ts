/**
 * The streams of one rank. Kernels run on the compute stream; communication runs on other streams, concurrently with later kernels, until
 * one of them accesses the same bytes. The results equal those of the plan's order.
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
}

/** The open streams of a rank. */
export type RankStreams = ReturnType<typeof openStreams>;

/** Opens the streams of a rank. */
export function openStreams(context: Context) {
  const open = (name: string): OwnStream => ({ name, stream: context.createStream(), seen: -1 });
  const compute = open("compute");
  const streams = new Map([[compute.name, compute]]);
  const computed = context.createEvent("order");
  /** Work of other streams that compute has not waited for, in issue order. */
  let pending: Pending[] = [];
  const spare: Event[] = [];
  let issued = 0;
  let order = 0;
  let timing:
    | { readonly began: Event; readonly marks: { label: Label; rankStream: RankStream; from: Event; to: Event }[]; readonly spare: Event[] }
    | undefined;

  const event = (): Event => spare.pop() ?? context.createEvent("order");
  const clock = (): Event => timing!.spare.pop() ?? context.createEvent();

  /** Makes the stream wait for conflicting work of other streams; the last conflict of each stream suffices. */
  function waitFor(rankStream: OwnStream, touch: Touch | "everything"): void {
    const last = new Map<OwnStream, Pending>();
    for (const p of pending) if (p.rankStream !== rankStream && (touch === "everything" || conflict(p, touch))) last.set(p.rankStream, p);
    for (const p of last.values()) context.wait(rankStream.stream, p.event);
    if (rankStream !== compute || last.size === 0) return;
    const over = (p: Pending): boolean => p.order <= (last.get(p.rankStream)?.order ?? -1);
    spare.push(...pending.filter(over).map((p) => p.event));
    pending = pending.filter((p) => !over(p));
  }

  function timed(label: Label | undefined, rankStream: RankStream, issue: (stream: Stream) => void): void {
    if (!timing || !label) {
      issue(rankStream.stream);
      return;
    }
    const [from, to] = [clock(), clock()];
    context.record(from, rankStream.stream);
    issue(rankStream.stream);
    context.record(to, rankStream.stream);
    timing.marks.push({ label, rankStream, from, to });
  }

  return {
    compute: compute as RankStream,
    /** Returns a stream by name; creates it on first use. */
    rankStream(name: string): RankStream {
      const known = streams.get(name) ?? open(name);
      streams.set(name, known);
      return known;
    },
    /** Issues work on the compute stream. */
    run(touch: Touch, label: Label | undefined, issue: (stream: Stream) => void): void {
      waitFor(compute, touch);
      issued++;
      timed(label, compute, issue);
    },
    /** Issues work on another stream, after all compute issued so far and after conflicting work of other streams. */
    beside(rankStream: RankStream, touch: Touch, label: Label | undefined, issue: (stream: Stream) => void): void {
      const own = streams.get(rankStream.name)!;
      if (own.seen !== issued) {
        context.record(computed, compute.stream);
        context.wait(own.stream, computed);
        own.seen = issued;
      }
      waitFor(own, touch);
      timed(label, own, issue);
      const done = event();
      context.record(done, own.stream);
      pending.push({ ...touch, rankStream: own, order: order++, event: done });
    },
    /** Makes compute wait for all other streams. */
    join(): void {
      waitFor(compute, "everything");
    },
    /** Clears completed work, so that a capture does not wait for it. */
    begin(profile: boolean): void {
      for (const rankStream of streams.values()) rankStream.seen = -1;
      if (timing) timing.spare.push(timing.began, ...timing.marks.flatMap(({ from, to }) => [from, to]));
      const kept = timing?.spare ?? [];
      timing = undefined;
      if (!profile) return;
      timing = { began: kept.pop() ?? context.createEvent(), marks: [], spare: kept };
      context.record(timing.began, compute.stream);
    },
    /** Returns the times of all work since the last `begin(true)`, in issue order. All work must be complete. */
    timed: (): Timed[] =>
      timing
        ? timing.marks.map(({ label, rankStream, from, to }) => ({
            ...label,
            stream: rankStream.name,
            begin_us: 1000 * context.elapsed(timing!.began, from),
            end_us: 1000 * context.elapsed(timing!.began, to),
          }))
        : [],
    /** Returns the first incomplete work since the last `begin(true)`, in issue order. */
    underWay: (): Label | undefined => timing?.marks.find(({ to }) => !context.happened(to))?.label,
    close(): void {
      const clocks = timing ? [timing.began, ...timing.spare, ...timing.marks.flatMap(({ from, to }) => [from, to])] : [];
      for (const e of [...spare, ...clocks, ...pending.map((p) => p.event), computed]) context.destroyEvent(e);
      for (const rankStream of streams.values()) context.destroyStream(rankStream.stream);
    },
  };
}

const meet = (a: readonly Span[], b: readonly Span[]): boolean => a.some(([from, to]) => b.some((s) => s[0] < to && from < s[1]));
const conflict = (a: Touch, b: Touch): boolean => meet(a.writes, b.reads) || meet(a.writes, b.writes) || meet(a.reads, b.writes);
