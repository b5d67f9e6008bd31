/** Tables of measured profiles: communication that nothing runs beside, and kernels beside it against the same kernels alone. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { expect, test } from "vitest";
import { traceOf } from "../../src/report/profile.ts";
import { besideRows, besideTable, exposedTime, prunedTrace, type Slice, slicesOf } from "../bench/traceTables.ts";
import { root } from "../support/checkout.ts";

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
  // the end of a slice is a sum of its begin and its duration, so times have the rounding of a sum
  const near = (us: number) => expect.closeTo(us, 9);
  expect(exposedTime(communication, kernels)).toEqual({ busy: near(260), alone: near(10) });
  expect(exposedTime(kernels, communication)).toEqual({ busy: near(420), alone: near(170) });
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

const folder = join(root, "test/results/traces-cuda-host");
const record = readFileSync(join(root, "test/results/cuda-host-2026-11-30.md"), "utf8").split("\n");
const kept = (name: string): string => gunzipSync(readFileSync(join(folder, `${name}.trace.json.gz`))).toString();

test("kept traces of two GPUs are small, and their events have what viewers of Chrome traces need", () => {
  const files = readdirSync(folder);
  expect(files.length).toBeGreaterThan(0);
  for (const file of files) {
    expect(readFileSync(join(folder, file)).length, file).toBeLessThan(200_000);
    const { traceEvents } = JSON.parse(kept(file.replace(".trace.json.gz", ""))) as { traceEvents: Record<string, unknown>[] };
    const work = traceEvents.filter(({ ph }) => ph === "X");
    expect(work.length, file).toBeGreaterThan(100);
    for (const { name, ts, dur } of work) expect([typeof name, typeof ts, typeof dur], file).toEqual(["string", "number", "number"]);
    const threads = traceEvents.filter(({ name }) => name === "thread_name").map(({ tid }) => tid);
    for (const { tid } of work) expect(threads, file).toContain(tid);
  }
});

test("kept traces of two GPUs give the tables of their record", () => {
  const isMove = ({ op }: Slice): boolean => ["all_gather", "reduce_scatter", "all_reduce"].includes(op);
  for (const mesh of ["data 2, overlap, gathered in forward, sums in bf16", "data 2, overlap, gathered in forward, gradients in bf16"]) {
    const slices = slicesOf(kept(mesh.replaceAll(/[^a-z0-9]+/gi, "-")));
    const [kernels, communication] = [slices.filter((s) => !isMove(s)), slices.filter(isMove)];
    const { busy, alone } = exposedTime(communication, kernels);
    const row = record.find((line) => line.startsWith(`| ${mesh} |`)) ?? "";
    expect(row.split(" | ").slice(5, 7), mesh).toEqual([busy, alone].map((us) => (us / 1e3).toFixed(1)));
    // the trace of one GPU with gradients in bf16 was not kept
    if (!mesh.endsWith("sums in bf16")) continue;
    const table = besideTable(besideRows(kernels, communication, slicesOf(kept("one-GPU"))).slice(0, 12));
    const at = record.indexOf(`### ${mesh}`);
    expect(at).toBeGreaterThan(0);
    expect(record.slice(at + 2, at + 2 + table.length)).toEqual(table);
  }
});

test("kept traces of the fourth run give the tables of their record, a tenth of a millisecond off at most", () => {
  const moves = ["all_gather", "all_reduce", "all_reduce_max", "all_to_all", "reduce_scatter", "recv", "send", "shift"];
  const isMove = ({ op }: Slice): boolean => moves.includes(op);
  const traceOfRun = (mesh: string): Slice[] => slicesOf(kept(`fourth-run-${mesh.replaceAll(/[^a-z0-9]+/gi, "-")}`));
  const meshes = ["expert 2, overlap", "tensor 2, expert 2", "tensor 2, expert 2, overlap", "context 2, ring"].map((mesh) => ({
    mesh,
    heading: mesh,
    one: "one GPU",
  }));
  const staged = ["pipeline 2, zero-bubble, 8 microbatches", "pipeline 2, two chunks, 8 microbatches"].map((mesh) => {
    return { mesh, heading: `${mesh}, divided kernels`, one: "one GPU, 8 microbatches" };
  });
  const from = record.findIndex((line) => line.startsWith("## Fourth run"));
  for (const { mesh, heading, one } of [...meshes, ...staged]) {
    const slices = traceOfRun(mesh);
    const [kernels, communication] = [slices.filter((s) => !isMove(s)), slices.filter(isMove)];
    const { busy, alone } = exposedTime(communication, kernels);
    const row = record.slice(from).find((line) => line.startsWith(`| ${heading} |`)) ?? "";
    const [busyMs, aloneMs] = row.split(" | ").slice(5, 7).map(Number);
    expect(Math.abs((busyMs ?? 0) - busy / 1e3), heading).toBeLessThan(0.1);
    expect(Math.abs((aloneMs ?? 0) - alone / 1e3), heading).toBeLessThan(0.1);
    const table = besideTable(besideRows(kernels, communication, traceOfRun(one)).slice(0, 12));
    const at = record.indexOf(`### ${heading}`, from);
    expect(at, heading).toBeGreaterThan(0);
    expect(record.slice(at + 2, at + 2 + table.length), heading).toEqual(table);
  }
});
