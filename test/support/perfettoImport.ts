/**
 * What Perfetto's importer makes of a trace in the Chrome format, by its rules (google/perfetto, src/trace_processor: importers/json,
 * importers/common/slice_tracker.cc and process_tracker.cc): times are microseconds times 1,000, cut to integers; slices of a thread are put on a
 * stack, in the order of their times, and one that begins within another and ends after it is dropped; number 0 is the idle process. The program itself
 * is not in a registry that tests reach.
 */

interface Event {
  readonly name?: unknown;
  readonly ph?: unknown;
  readonly ts?: unknown;
  readonly dur?: unknown;
  readonly pid?: unknown;
  readonly tid?: unknown;
  readonly args?: { readonly name?: unknown };
}

/** A thread of an imported trace, with its name, that of its process, and its slices in nanoseconds. */
export interface ImportedThread {
  readonly process: string;
  readonly thread: string;
  readonly isMain: boolean;
  readonly slices: { readonly name: string; readonly begin: number; readonly end: number; readonly depth: number }[];
}

/** Returns the threads, and what the importer would report. */
export function importTrace(text: string): { readonly threads: ImportedThread[]; readonly faults: string[] } {
  const { traceEvents } = JSON.parse(text) as { readonly traceEvents: readonly Event[] };
  const faults: string[] = [];
  const processes = new Map<number, string>();
  const threads = new Map<string, ImportedThread & { pid: number }>();
  /** Names of threads are found by their number alone. */
  const owners = new Map<number, number>();
  const isNumber = (n: unknown): n is number => typeof n === "number" && Number.isInteger(n) && n > 0 && n < 2 ** 32;
  const slices: { thread: ImportedThread; name: string; begin: number; duration: number }[] = [];
  for (const { name, ph, ts, dur, pid, tid, args } of traceEvents) {
    const said = JSON.stringify({ name, ph, ts, dur, pid, tid });
    if (!isNumber(pid) || (tid !== undefined && !isNumber(tid))) {
      faults.push(`a process or thread has no number above 0: ${said}`);
      continue;
    }
    if (ph === "M" && name === "process_name" && typeof args?.name === "string") processes.set(pid, args.name);
    else if (ph === "M" && name === "thread_name" && typeof args?.name === "string" && isNumber(tid)) {
      if ((owners.get(tid) ?? pid) !== pid) faults.push(`two processes have a thread ${tid}`);
      owners.set(tid, pid);
      threads.set(`${pid} ${tid}`, { pid, process: "", thread: args.name, isMain: tid === pid, slices: [] });
    } else if (ph === "X" && typeof name === "string" && typeof ts === "number" && typeof dur === "number" && ts >= 0 && dur >= 0) {
      const thread = threads.get(`${pid} ${tid}`);
      if (!thread) faults.push(`a slice is on a thread without a name: ${said}`);
      else slices.push({ thread, name, begin: Math.trunc(ts * 1000), duration: Math.trunc(dur * 1000) });
    } else faults.push(`an event is not read: ${said}`);
  }
  const stacks = new Map<ImportedThread, { begin: number; duration: number }[]>();
  for (const { thread, name, begin, duration } of slices.toSorted((a, b) => a.begin - b.begin)) {
    const stack = stacks.get(thread) ?? [];
    stacks.set(thread, stack);
    let isDropped = false;
    for (let top = stack.at(-1); top && !isDropped; top = stack.at(-1)) {
      const end = top.begin + top.duration;
      if (end > begin || (end === begin && top.duration === 0 && duration === 0)) {
        isDropped = stack.some((open) => begin < open.begin + open.duration && begin + duration > open.begin + open.duration);
        break;
      }
      stack.pop();
    }
    if (isDropped) faults.push(`${thread.thread}: ${name} at ${begin} ns overlaps another slice, and is dropped`);
    else {
      thread.slices.push({ name, begin, end: begin + duration, depth: stack.length });
      stack.push({ begin, duration });
    }
  }
  return { threads: [...threads.values()].map(({ pid, ...thread }) => ({ ...thread, process: processes.get(pid) ?? "" })), faults };
}
