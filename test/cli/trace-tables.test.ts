/** Tables of measured profiles: communication that nothing runs beside, and kernels beside it against the same kernels alone. */
import { expect, test } from "vitest";
import { traceOf } from "../../src/report/profile.ts";
import { besideRows, besideTable, exposedTime, prunedTrace, type Slice, slicesOf } from "../bench/traceTables.ts";

const timing = (rank: number, id: string, op: string, stream: string, begin_us: number, end_us: number) => ({
  ...{ rank, id, op, stream, begin_us, end_us, kernel: "" },
});
// in µs: a kernel alone, one that a collective covers, one that it covers for less than half
const timings = [
  timing(0, "a", "gemm", "compute", 0, 100),
  timing(0, "r", "reduce_scatter", "gradients", 90, 340),
  timing(0, "b", "gemm", "compute", 100, 300.04),
  timing(0, "c", "add", "compute", 300.04, 420),
  timing(0, "n", "all_reduce", "comm", 420, 430),
  timing(1, "a", "gemm", "compute", 0, 50),
];
const trace = traceOf(timings);
const isCommunication = ({ op }: Slice): boolean => op === "reduce_scatter" || op === "all_reduce";
const split = (slices: readonly Slice[]) => [slices.filter((s) => !isCommunication(s)), slices.filter(isCommunication)] as const;

test("communication is busy in the union of its slices, and exposed where no kernel runs", () => {
  const [kernels, communication] = split(slicesOf(trace));
  expect(exposedTime(communication, kernels)).toEqual({ busy: 260, alone: 10 });
  expect(exposedTime(kernels, communication)).toEqual({ busy: 420, alone: 170 });
  expect(exposedTime([], kernels)).toEqual({ busy: 0, alone: 0 });
});

test("kernels beside communication are compared with the same kernels alone, per op", () => {
  const [kernels, communication] = split(slicesOf(trace));
  const slice = (name: string, op: string, end: number): Slice => ({ name, op, stream: 0, begin: 0, end });
  const alone = [slice("a", "gemm", 100), slice("b", "gemm", 125), slice("c", "add", 120)];
  const rows = besideRows(kernels, communication, alone);
  expect(rows.map(({ op }) => op)).toEqual(["gemm", "add"]);
  expect(rows[0]?.beside).toMatchObject({ calls: 1, alone: 125 });
  expect(rows[0]?.apart).toEqual({ calls: 1, time: 100, alone: 100 });
  expect(rows[1]?.beside.calls).toBe(0);
  expect(besideTable(rows).slice(2)).toEqual(["| gemm | 1 | 0.20 | 1.60 | 1 | 0.10 | 1.00 |", "| add |  |  |  | 1 | 0.12 | 1.00 |"]);
  // a kernel that one GPU does not run says nothing
  expect(besideRows(kernels, communication, [])).toEqual([]);
});

test("a pruned trace has one rank and tenths of a microsecond, and the same tables within that", () => {
  const pruned = slicesOf(prunedTrace(trace));
  expect(pruned.map(({ name }) => name)).toEqual(["a", "r", "b", "c", "n"]);
  for (const [n, s] of slicesOf(trace).entries()) {
    expect(pruned[n]?.begin).toBeCloseTo(s.begin, 1);
    expect(pruned[n]?.end).toBeCloseTo(s.end, 0);
  }
  expect(slicesOf(prunedTrace(trace), 1)).toEqual([]);
});
