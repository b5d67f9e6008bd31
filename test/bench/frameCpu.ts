/** CPU time of the threads of a browser from its own trace: it does not depend on other load of the machine, as frames a second do. */

/** An event of a trace that `browser.stopTracing` returns: times in microseconds. */
interface TraceEvent {
  readonly ph: string;
  readonly name: string;
  readonly pid: number;
  readonly tid: number;
  readonly ts: number;
  readonly dur?: number;
  /** CPU time of the thread. */
  readonly tdur?: number;
  readonly args?: { readonly name?: string };
}

/** Returns the CPU milliseconds of each thread of a trace, by the names of process and thread. Nested events count once. */
export function cpuByThread(trace: Buffer): Map<string, number> {
  const { traceEvents } = JSON.parse(trace.toString()) as { traceEvents: readonly TraceEvent[] };
  const nameOf = (what: "process_name" | "thread_name", { pid, tid }: TraceEvent): string =>
    traceEvents.find((e) => e.name === what && e.pid === pid && (what === "process_name" || e.tid === tid))?.args?.name ?? "";
  const threads = new Map<string, TraceEvent[]>();
  for (const event of traceEvents) {
    if (event.ph !== "X" || event.tdur === undefined) continue;
    const key = `${event.pid} ${event.tid}`;
    const own = threads.get(key) ?? [];
    threads.set(key, own);
    own.push(event);
  }
  const sums = new Map<string, number>();
  for (const events of threads.values()) {
    events.sort((a, b) => a.ts - b.ts || (b.dur ?? 0) - (a.dur ?? 0));
    let end = Number.NEGATIVE_INFINITY;
    let sum = 0;
    for (const { ts, dur = 0, tdur = 0 } of events) {
      if (ts < end) continue;
      end = ts + dur;
      sum += tdur;
    }
    const [first] = events;
    const name = first ? `${nameOf("process_name", first)} ${nameOf("thread_name", first)}` : "";
    sums.set(name, (sums.get(name) ?? 0) + sum / 1000);
  }
  return sums;
}
