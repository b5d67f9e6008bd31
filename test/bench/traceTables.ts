/** What profiles of steps say about overlap: communication, what of it nothing runs beside, and how much slower kernels are beside it. */

/** A piece of work of one rank in a trace, in microseconds. */
export interface Slice {
  readonly name: string;
  readonly op: string;
  readonly stream: number;
  readonly begin: number;
  readonly end: number;
}

interface NamedEvent {
  readonly name: string;
  readonly pid: number;
  readonly args?: { readonly name?: string };
}
/** Returns the process of a rank: it is named after the rank. */
export const processOf = (events: readonly NamedEvent[], rank: number): number | undefined =>
  events.find(({ name, args }) => name === "process_name" && args?.name?.split(",")[0] === `rank ${rank}`)?.pid;

/** Returns the work of a rank in a trace of `rankc run --profile`. */
export function slicesOf(trace: string, rank = 0): Slice[] {
  const { traceEvents } = JSON.parse(trace) as {
    traceEvents: (NamedEvent & { ph: string; tid: number; ts: number; dur: number; cat: string })[];
  };
  const own = processOf(traceEvents, rank);
  return traceEvents
    .filter(({ ph, pid }) => ph === "X" && pid === own)
    .map(({ name, cat, tid, ts, dur }) => ({ name, op: cat, stream: tid, begin: ts, end: ts + dur }));
}

/** Returns a trace of one rank with times in tenths of a microsecond: small enough to be kept. */
export function prunedTrace(trace: string, rank = 0): string {
  const { traceEvents, ...rest } = JSON.parse(trace) as { traceEvents: (NamedEvent & { ts?: number; dur?: number })[] };
  const own = processOf(traceEvents, rank);
  const rounded = (us: number): number => Math.round(10 * us) / 10;
  const kept = traceEvents
    .filter(({ pid }) => pid === own)
    .map(({ ts, dur, ...e }) => ({ ...e, ...(ts !== undefined && { ts: rounded(ts) }), ...(dur !== undefined && { dur: rounded(dur) }) }));
  return `${JSON.stringify({ ...rest, traceEvents: kept })}\n`;
}

/** Returns the microseconds in which any of `slices` runs, and in which one of `slices` runs and none of `others`. */
export function exposedTime(slices: readonly Slice[], others: readonly Slice[]): { readonly busy: number; readonly alone: number } {
  const edges = [
    ...slices.flatMap((s) => [
      { at: s.begin, own: 1, other: 0 },
      { at: s.end, own: -1, other: 0 },
    ]),
    ...others.flatMap((s) => [
      { at: s.begin, own: 0, other: 1 },
      { at: s.end, own: 0, other: -1 },
    ]),
  ].sort((a, b) => a.at - b.at);
  let [own, other, before, busy, alone] = [0, 0, 0, 0, 0];
  for (const edge of edges) {
    if (own > 0) busy += edge.at - before;
    if (own > 0 && other === 0) alone += edge.at - before;
    own += edge.own;
    other += edge.other;
    before = edge.at;
  }
  return { busy, alone };
}

/** Kernels of one op in a step, in microseconds. */
export interface BesideRow {
  readonly op: string;
  /** Those that communication runs beside for at least half of their time: their number, time, and time in the profile without communication. */
  readonly beside: { readonly calls: number; readonly time: number; readonly alone: number };
  /** The others. */
  readonly apart: { readonly calls: number; readonly time: number; readonly alone: number };
}

/**
 * Returns per op the time of the kernels of a step with and without communication beside them, and the time of the same kernels in a profile
 * that has no communication: the one with most time first. Kernels that the other profile lacks are left out.
 */
export function besideRows(kernels: readonly Slice[], communication: readonly Slice[], alone: readonly Slice[]): BesideRow[] {
  const known = new Map<string, number>();
  for (const { name, begin, end } of alone) known.set(name, (known.get(name) ?? 0) + end - begin);
  const sums = new Map<string, { beside: Sum; apart: Sum }>();
  const byName = new Map<string, Slice[]>();
  for (const k of kernels) byName.set(k.name, [...(byName.get(k.name) ?? []), k]);
  for (const [name, own] of byName) {
    const other = known.get(name);
    const op = own[0]?.op;
    if (other === undefined || op === undefined) continue;
    const time = own.reduce((sum, { begin, end }) => sum + end - begin, 0);
    const covered = own.reduce((sum, k) => sum + k.end - k.begin - exposedTime([k], communication).alone, 0);
    const row = sums.get(op) ?? { beside: { calls: 0, time: 0, alone: 0 }, apart: { calls: 0, time: 0, alone: 0 } };
    sums.set(op, row);
    const sum = covered >= time / 2 ? row.beside : row.apart;
    sum.calls += own.length;
    sum.time += time;
    sum.alone += other;
  }
  return [...sums].map(([op, row]) => ({ op, ...row })).sort((a, b) => b.beside.time + b.apart.time - a.beside.time - a.apart.time);
}
interface Sum {
  calls: number;
  time: number;
  alone: number;
}

/** Returns rows as lines of a table: calls, ms, and how many times as long as alone, beside communication and apart from it. */
export function besideTable(rows: readonly BesideRow[]): string[] {
  const cells = ({ calls, time, alone }: Sum): string[] =>
    calls > 0 ? [String(calls), (time / 1e3).toFixed(2), (time / alone).toFixed(2)] : ["", "", ""];
  return [
    "| op | calls beside | ms | times as long as alone | calls apart | ms | times as long as alone |",
    "|---|---|---|---|---|---|---|",
    ...rows.map(({ op, beside, apart }) => `| ${[op, ...cells(beside), ...cells(apart)].join(" | ")} |`),
  ];
}
