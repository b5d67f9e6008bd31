/**
 * Traces in the Chrome trace format, which Perfetto and chrome://tracing open: one process per rank, one track per stream. Measured profiles,
 * schedules and estimates share this writer; the caller supplies the slices with their times.
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
  const tids = new Map(streams.map((stream, tid) => [stream, tid]));
  yield `{"displayTimeUnit":"ms","otherData":${JSON.stringify(notes)},"traceEvents":[`;
  let before = "\n";
  const event = (value: object): string => {
    const text = before + JSON.stringify(value);
    before = ",\n";
    return text;
  };
  for (const { rank: pid, name, slices } of ranks) {
    yield event({ name: "process_name", ph: "M", pid, args: { name } });
    for (const [stream, tid] of tids) yield event({ name: "thread_name", ph: "M", pid, tid, args: { name: stream } });
    for (const s of slices())
      yield event({
        name: s.name,
        cat: s.category,
        ph: "X",
        ts: s.begin_us,
        dur: s.end_us - s.begin_us,
        pid,
        tid: tids.get(s.stream) ?? 0,
      });
  }
  yield "\n]}\n";
}
