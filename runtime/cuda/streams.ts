/**
 * Lanes: the streams of one rank. Kernels run on the compute lane; what moves between ranks runs on lanes of its own, beside
 * the kernels that follow, until one of them touches the same bytes. So results are those of the plan's order.
 */
import type { Context, Event, Stream } from "./driver.ts";

/** Bytes of device memory, [begin, end). */
export type Span = readonly [number, number];
export interface Touch {
  readonly reads: readonly Span[];
  readonly writes: readonly Span[];
}
/** What a piece of work is called in a profile. */
export interface Label {
  readonly id: string;
  readonly op: string;
  /** Empty for what is no kernel. */
  readonly kernel: string;
}
export interface RankStream {
  readonly name: string;
  readonly stream: Stream;
}
export interface Timed extends Label {
  readonly stream: string;
  readonly begin_us: number;
  readonly end_us: number;
}

interface OwnLane extends RankStream {
  /** How much compute had been issued when this lane last waited for it. */
  seen: number;
}
interface Pending extends Touch {
  readonly rankStream: OwnLane;
  readonly order: number;
  readonly event: Event;
}

export type RankStreams = ReturnType<typeof openStreams>;

export function openStreams(context: Context) {
  const open = (name: string): OwnLane => ({ name, stream: context.createStream(), seen: -1 });
  const compute = open("compute");
  const streams = new Map([[compute.name, compute]]);
  const computed = context.createEvent("order");
  /** Work of other lanes that compute has not waited for, in the order of issue. */
  let pending: Pending[] = [];
  const spare: Event[] = [];
  let issued = 0;
  let order = 0;
  let timing:
    | { readonly began: Event; readonly marks: { label: Label; rankStream: RankStream; from: Event; to: Event }[]; readonly spare: Event[] }
    | undefined;

  const event = (): Event => spare.pop() ?? context.createEvent("order");
  const clock = (): Event => timing!.spare.pop() ?? context.createEvent();

  /** The stream waits for what touches the same bytes on other lanes: for the last of each, those before it are done then too. */
  function waitFor(rankStream: OwnLane, touch: Touch | "everything"): void {
    const last = new Map<OwnLane, Pending>();
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
    /** A lane by its name, made when first asked for. */
    rankStream(name: string): RankStream {
      const known = streams.get(name) ?? open(name);
      streams.set(name, known);
      return known;
    },
    /** Issues work on the compute lane. */
    run(touch: Touch, label: Label | undefined, issue: (stream: Stream) => void): void {
      waitFor(compute, touch);
      issued++;
      timed(label, compute, issue);
    },
    /** Issues work beside compute: after all compute issued so far, and after what touches the same bytes on other lanes. */
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
    /** Compute goes no further before all lanes are done. */
    join(): void {
      waitFor(compute, "everything");
    },
    /** Forgets what was issued before: it is done, and a capture must not wait for it. */
    begin(profile: boolean): void {
      for (const rankStream of streams.values()) rankStream.seen = -1;
      if (timing) timing.spare.push(timing.began, ...timing.marks.flatMap(({ from, to }) => [from, to]));
      const kept = timing?.spare ?? [];
      timing = undefined;
      if (!profile) return;
      timing = { began: kept.pop() ?? context.createEvent(), marks: [], spare: kept };
      context.record(timing.began, compute.stream);
    },
    /** Since the last `begin(true)`, when all is done: what ran where, and when, in the order of issue. */
    timed: (): Timed[] =>
      timing
        ? timing.marks.map(({ label, rankStream, from, to }) => ({
            ...label,
            stream: rankStream.name,
            begin_us: 1000 * context.elapsed(timing!.began, from),
            end_us: 1000 * context.elapsed(timing!.began, to),
          }))
        : [],
    /** Since the last `begin(true)`: the first work, in the order of issue, that is not done. */
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
