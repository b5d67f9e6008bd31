/**
 * Deterministic sums without float atomics: over the invocations of a workgroup, of an operand to a scalar, and over the columns of an
 * operand.
 */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { type Binding, type EntryPoint, foldGrid, kernel, scratchBytes } from "./text.ts";

/** Threads of a workgroup. */
export const THREADS = 256;

/** Invocations per row that first combine the values of the others. */
const SOME = 16;

/** Returns the function `total(value, lane)`, which reduces over `lanes` invocations (a power of two). `combine` is an expression of `a` and `b`. */
export const totalOver = (lanes: number, { type = "f32", combine = "a + b" } = {}): string =>
  render("wgsl/total.wgsl", { lanes, threads: THREADS, type, combine, deep: lanes > SOME, some: Math.min(SOME, lanes) });

/** Largest number of workgroups of a sum: the number of invocations of the second launch. */
const SHARES = THREADS;

/** The terms of a sum to the scalar `y`. */
export interface ScalarSum {
  readonly buffers: readonly Binding[];
  /** Number of terms; `term` is the i-th one, evaluated after `lines`. */
  readonly count: number;
  readonly term: string;
  readonly lines?: readonly string[];
  readonly functions?: readonly string[];
  readonly factor: string;
}

/** Returns a kernel for y (+)= factor · the sum of the terms. */
export function scalarSum(spec: KernelSpec, { buffers, count, term, lines = [], functions = [], factor }: ScalarSum): GeneratedKernel {
  const groups = Math.min(SHARES, Math.ceil(count / THREADS));
  const shares = { arg: scratchStart, type: "f32" };
  const entries: EntryPoint[] = [
    { entry: `${spec.name}_shares`, grid: [groups, 1, 1], threads: THREADS, buffers: [...buffers, { ...shares, name: "shares" }] },
    {
      entry: spec.name,
      grid: [1, 1, 1],
      threads: THREADS,
      buffers: [
        { ...shares, name: "all_shares" },
        { arg: "y", type: "f32" },
      ],
    },
  ];
  const text = render("wgsl/scalar.wgsl", {
    ...{ op: spec.op, entry: spec.name, threads: THREADS, groups, count, stride: groups * THREADS },
    ...{ functions: [...functions], lines: [...lines], term, factor, accumulates: spec.accumulates.has("y") },
  });
  return kernel(spec, entries, [totalOver(THREADS), text], scratchBytes(SHARES));
}

/** The terms of sums over the rows of an operand, per column. */
export interface ColumnSum {
  readonly out: string;
  /** Prefix of the names of the entries; default: the name of the kernel. */
  readonly entry?: string;
  readonly buffers: readonly Binding[];
  readonly batches: number;
  readonly rows: number;
  readonly width: number;
  /** The element of `row` and `column`, `at = row · width + column`. */
  readonly term: string;
  /** Words of scratch before those that the sum uses. */
  readonly first: number;
  /** The attribute with the row of `out` that receives the sums; default: the first row. */
  readonly row?: string;
}

/** Returns the entries for out[batch, column] (+)= the sum over rows of the term, their text, and the words of scratch up to their end. */
export function columnSum(
  spec: KernelSpec,
  { out, entry = spec.name, buffers, batches, rows, width, term, first, row }: ColumnSum,
): { entries: EntryPoint[]; text: string; words: number } {
  // both launches have loops of similar length
  const depth = Math.max(16, Math.ceil(Math.sqrt(rows)));
  const depths = Math.ceil(rows / depth);
  const parts = batches * depths * width;
  const outputs = batches * width;
  const [groups, outGroups] = [Math.ceil(parts / THREADS), Math.ceil(outputs / THREADS)];
  const sums = { arg: scratchStart, type: "f32" };
  // scratch has one binding per launch, so a term that reads scratch also names it `sums`
  const entries: EntryPoint[] = [
    { entry: `${entry}_depths`, grid: groups, threads: THREADS, buffers: [...buffers, { ...sums, name: "sums" }] },
    {
      entry: `${entry}_columns`,
      grid: outGroups,
      threads: THREADS,
      buffers: [
        { ...sums, name: "all_sums" },
        { arg: out, type: "f32" },
      ],
      ...(row !== undefined && { attrs: [row] }),
    },
  ];
  const text = render("wgsl/column_reduce.wgsl", {
    at: row === undefined ? "i" : `start.attr.x * ${width}u + i`,
    ...{ entry, threads: THREADS, batches, rows, width, depth, depths, parts, perBatch: depths * width },
    ...{
      index: foldGrid(groups).index,
      outIndex: foldGrid(outGroups).index,
      outputs,
      first,
      term,
      out,
      accumulates: spec.accumulates.has(out),
    },
  });
  return { entries, text, words: first + parts };
}
