/** Copies around a collective: reordering of blocks, rows by destination, merging of row lists. */

import { cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import * as ops from "../../ops/rearrange.ts";
import { arrangementOf } from "../arrangement.ts";
import { cudaKernel, destinationsOf, type GeneratedKernel, type KernelSpec, offsetsAt, type SpecOf } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, ownBlock, startOf } from "../launchArgs.ts";
import { source, vectorOf } from "./text.ts";

const THREADS = 256;
const UNROLL = 4;
const INT_MAX = 2 ** 31 - 1;

const launch = (entry: string, items: number, each: number, args: readonly KernelArg[]): GeneratedLaunch => ({
  entry,
  grid: [Math.max(1, Math.ceil(items / each)), 1, 1],
  threads: THREADS,
  shared: 0,
  args,
});
const divisor = (a: number, b: number): number => (b === 0 ? a : divisor(b, a % b));
/** Returns the launch argument of kernels whose input has blocks. */
const blockArgs = ({ blocks }: KernelSpec): KernelArg[] => (blocks ? [ownBlock] : []);

function arrange(spec: SpecOf<typeof ops.arrange>): GeneratedKernel {
  const { vectors, width, dims } = arrangementOf(spec, (...sizes) => vectorOf(sizes.reduce(divisor), [spec.dtype.x]), "elements");
  const values = {
    ...{
      name: spec.name,
      type: cudaType(spec.dtype.x),
      width,
      unroll: UNROLL,
      threads: THREADS,
      vectors,
      hasBlocks: spec.blocks !== undefined,
    },
    ...{ index: vectors + THREADS * UNROLL > INT_MAX ? "i64" : "int", dims: dims.toReversed() },
  };
  return {
    source: source(spec, render("cuda/arrange.cu", values)),
    launches: [launch(spec.name, vectors, THREADS * UNROLL, ["x", "y", ...blockArgs(spec)])],
  };
}

function takeRows(spec: SpecOf<typeof ops.takeRows>): GeneratedKernel {
  const width = vectorOf(spec.d.width, [spec.dtype.x]);
  const vectors = spec.d.width / width;
  const total = spec.d.N * vectors;
  const values = {
    ...{ name: spec.name, type: cudaType(spec.dtype.x), width, unroll: UNROLL, threads: THREADS, vectors, total },
    index: total + THREADS * UNROLL > INT_MAX ? "i64" : "int",
  };
  return {
    source: source(spec, render("cuda/take_rows.cu", values)),
    launches: [launch(spec.name, total, THREADS * UNROLL, ["x", "from", "y"])],
  };
}

function invertRows(spec: SpecOf<typeof ops.invertRows>): GeneratedKernel {
  const [sources, targets] = [spec.size.from, spec.size.to];
  return {
    source: source(spec, render("cuda/invert_rows.cu", { name: spec.name, sources, targets })),
    launches: [launch(`${spec.name}_clear`, targets, THREADS, ["to"]), launch(spec.name, sources, THREADS, ["from", "to"])],
  };
}

function splitRows(spec: SpecOf<typeof ops.splitRows>): GeneratedKernel {
  const cap = spec.d.cap;
  const factors = destinationsOf(spec);
  const checked = "needed" in spec.dtype;
  const lists = spec.size.lists / (1 + 3 * cap);
  return {
    source: source(spec, render("cuda/split_rows.cu", { name: spec.name, threads: THREADS, cap, factors, checked })),
    launches: [launch(spec.name, lists, 1, ["index", "lists", "from", ...(checked ? ["needed"] : [])])],
  };
}

function mergeRows(spec: SpecOf<typeof ops.mergeRows>): GeneratedKernel {
  const { count, length, cap, bound, E } = spec.d;
  const checked = "needed" in spec.dtype;
  const [indexLength, fromLength] = [spec.size.index, spec.size.from];
  const values = {
    ...{ name: spec.name, count, length, cap, bound, hasBlocks: spec.blocks !== undefined, checked, indexLength, fromLength },
    ...{ experts: E, offsets: offsetsAt(bound) },
  };
  return {
    source: source(spec, render("cuda/merge_rows.cu", values)),
    launches: [
      launch(`${spec.name}_clear`, Math.max(indexLength, fromLength), THREADS, ["index", "from"]),
      launch(spec.name, count * cap, THREADS, ["lists", "index", "from", ...blockArgs(spec)]),
      launch(`${spec.name}_ends`, 1, 1, ["lists", "index", ...(checked ? ["needed"] : []), startOf("E"), ...blockArgs(spec)]),
    ],
  };
}

/** CUDA kernels around collectives. */
export const transport = {
  arrange: cudaKernel(ops.arrange, arrange),
  take_rows: cudaKernel(ops.takeRows, takeRows),
  invert_rows: cudaKernel(ops.invertRows, invertRows),
  split_rows: cudaKernel(ops.splitRows, splitRows),
  merge_rows: cudaKernel(ops.mergeRows, mergeRows),
};
