/**
 * Traces in the Chrome trace format, which Perfetto and chrome://tracing open: one process per rank, one track per stream. Measured profiles,
 * schedules and estimates share this writer; the caller supplies the slices with their times.
 *
 * What Perfetto's importer asks beyond the format (google/perfetto, src/trace_processor/importers: json, common/slice_tracker.cc; issue 394):
 * numbers of processes and threads begin at 1, since 0 is the idle thread of Linux; a thread with the number of its process is the main
 * thread, which is shown first; and slices of a thread are nested or apart in whole nanoseconds, to which microseconds times 1,000 are cut. A
 * slice that begins a nanosecond before the end of another is dropped.
 */

/** A slice of a track: a name, a category, and its times in microseconds. */
export interface TraceSlice {
  readonly stream: string;
  readonly name: string;
  readonly category: string;
  readonly begin_us: number;
  readonly end_us: number;
}

/** A rank of a trace: its name, and its slices. */
export interface TracedRank {
  readonly rank: number;
  readonly name: string;
  slices(): Iterable<TraceSlice>;
}

/** Yields the text of a trace, one event per line. `streams` are the tracks of each rank, in order. */
export function* traceText(ranks: Iterable<TracedRank>, streams: readonly string[], notes: object = {}): Generator<string> {
  const main = streams.includes("compute") ? "compute" : streams[0];
  yield `{"displayTimeUnit":"ms","otherData":${JSON.stringify(notes)},"traceEvents":[`;
  let before = "\n";
  const event = (value: object): string => {
    const text = before + JSON.stringify(value);
    before = ",\n";
    return text;
  };
  for (const { rank, name, slices } of ranks) {
    const pid = rank + 1;
    const tids = new Map(streams.map((stream, n) => [stream, stream === main ? pid : pid + (n + 1) * THREADS]));
    yield event({ name: "process_name", ph: "M", pid, args: { name } });
    for (const [stream, tid] of tids) yield event({ name: "thread_name", ph: "M", pid, tid, args: { name: stream } });
    for (const s of slices()) {
      const [begin, end] = [Math.round(s.begin_us * 1000), Math.round(s.end_us * 1000)];
      const times = { ts: microseconds(begin), dur: microseconds(end - begin) };
      yield event({ name: s.name, cat: s.category, ph: "X", ...times, pid, tid: tids.get(s.stream) ?? pid });
    }
  }
  yield "\n]}\n";
}

/** More than the ranks of any plan: threads of different streams and ranks have different numbers. */
const THREADS = 1_000_000;

/** Returns nanoseconds as microseconds that, times 1,000 and cut to an integer, are these nanoseconds again: 1,001 ns are 1.0010000000000001 µs. */
function microseconds(nanoseconds: number): number {
  const us = nanoseconds / 1000;
  return Math.trunc(us * 1000) >= nanoseconds ? us : us * (1 + Number.EPSILON);
}
