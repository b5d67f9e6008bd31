/** Copies around a collective: reordering of blocks, rows by destination, merging of row lists. */
import { render } from "../../../templates/bindings.ts";
import * as ops from "../../ops/rearrange.ts";
import { arrangementOf } from "../arrangement.ts";
import { destinationsOf, type GeneratedKernel, type KernelSpec, offsetsAt, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { ownBlock } from "../launchArgs.ts";
import { type Binding, bindingOf, type EntryPoint, foldGrid, kernel, type Start, widthOf } from "./text.ts";

const THREADS = 256;

/** Returns the launch argument of kernels whose input has blocks. */
const blockStarts = ({ blocks }: KernelSpec): Start[] => (blocks ? [ownBlock] : []);

function arrange(spec: SpecOf<typeof ops.arrange>): GeneratedKernel {
  const { width, vectors, dims } = arrangementOf(spec, widthOf, "vectors");
  const starts = blockStarts(spec);
  const grid = Math.ceil(vectors / THREADS);
  const buffers = [bindingOf(operandOf(spec, "x"), width), bindingOf(operandOf(spec, "y"), width)];
  const values = {
    op: spec.op,
    entry: spec.name,
    threads: THREADS,
    width,
    index: foldGrid(grid).index,
    vectors,
    first: starts.length > 0 ? `u32(start.x / ${width})` : "0u",
    dims: dims.toReversed(),
  };
  return kernel(spec, [{ entry: spec.name, grid, threads: THREADS, buffers, starts }], [render("wgsl/arrange.wgsl", values)]);
}

function takeRows(spec: SpecOf<typeof ops.takeRows>): GeneratedKernel {
  const width = widthOf(spec.d.width);
  const vectors = spec.d.width / width;
  const total = spec.d.N * vectors;
  const buffers: Binding[] = [
    bindingOf(operandOf(spec, "x"), width),
    { arg: "from", name: "rows_from", type: "i32" },
    bindingOf(operandOf(spec, "y"), width),
  ];
  const groups = Math.ceil(total / THREADS);
  const values = { op: spec.op, entry: spec.name, threads: THREADS, width, vectors, total, index: foldGrid(groups).index };
  return kernel(spec, [{ entry: spec.name, grid: groups, threads: THREADS, buffers }], [render("wgsl/take_rows.wgsl", values)]);
}

function invertRows(spec: SpecOf<typeof ops.invertRows>): GeneratedKernel {
  const [sources, targets] = [spec.size.from, spec.size.to];
  const groups = (n: number) => Math.ceil(n / THREADS);
  const clear: EntryPoint = {
    entry: `${spec.name}_clear`,
    grid: groups(targets),
    threads: THREADS,
    buffers: [{ arg: "to", name: "cleared", type: "i32" }],
  };
  const entry: EntryPoint = {
    entry: spec.name,
    grid: groups(sources),
    threads: THREADS,
    buffers: [
      { arg: "from", name: "rows_from", type: "i32" },
      { arg: "to", name: "rows_to", type: "i32" },
    ],
  };
  const values = {
    ...{ op: spec.op, clear: clear.entry, entry: spec.name, threads: THREADS, sources, targets },
    ...{ index: foldGrid(groups(sources)).index, clearIndex: foldGrid(groups(targets)).index },
  };
  return kernel(spec, [clear, entry], [render("wgsl/invert_rows.wgsl", values)]);
}

const needed: Binding = { arg: "needed", type: "i32" };

function splitRows(spec: SpecOf<typeof ops.splitRows>): GeneratedKernel {
  const cap = spec.d.cap;
  const length = 1 + 3 * cap;
  const factors = destinationsOf(spec);
  const checked = "needed" in spec.dtype;
  const entry: EntryPoint = {
    entry: spec.name,
    grid: [spec.size.lists / length, 1, 1],
    threads: THREADS,
    buffers: [
      { arg: "index", type: "i32" },
      { arg: "lists", type: "i32" },
      { arg: "from", name: "rows_from", type: "i32" },
      ...(checked ? [{ ...needed, type: "atomic<i32>" }] : []),
    ],
  };
  // the largest number of rows that fits into the index
  const rows = Math.floor((spec.size.index - 1) / 3);
  const values = { op: spec.op, entry: spec.name, threads: THREADS, rows, factors, cap, length, checked };
  return kernel(spec, [entry], [render("wgsl/split_rows.wgsl", values)]);
}

function mergeRows(spec: SpecOf<typeof ops.mergeRows>): GeneratedKernel {
  const { count, length, cap, bound, E } = spec.d;
  const starts = blockStarts(spec);
  const checked = "needed" in spec.dtype;
  const groups = (n: number) => Math.ceil(n / THREADS);
  const [indexLength, fromLength] = [spec.size.index, spec.size.from];
  const clearGroups = groups(Math.max(indexLength, fromLength));
  const clear: EntryPoint = {
    entry: `${spec.name}_clear`,
    grid: clearGroups,
    threads: THREADS,
    buffers: [
      { arg: "index", name: "cleared_index", type: "i32" },
      { arg: "from", name: "cleared_from", type: "i32" },
    ],
  };
  const lists: Binding[] = [
    { arg: "lists", type: "i32" },
    { arg: "index", type: "i32" },
  ];
  const entry: EntryPoint = {
    entry: spec.name,
    grid: groups(count * cap),
    threads: THREADS,
    buffers: [...lists, { arg: "from", name: "rows_from", type: "i32" }],
    starts,
  };
  const ends: EntryPoint = {
    entry: `${spec.name}_ends`,
    grid: [1, 1, 1],
    threads: THREADS,
    buffers: [...lists, ...(checked ? [needed] : [])],
    starts: ["E", ...starts],
    uniform: "ends_start",
  };
  const [first, endsFirst] = starts.length > 0 ? ["start.x", "ends_start.y"] : ["0", "0"];
  const values = {
    ...{ op: spec.op, prefix: spec.name, clear: clear.entry, entry: spec.name, ends: ends.entry, threads: THREADS },
    ...{ count, length, cap, bound, experts: E, first, endsFirst, firstExpert: "ends_start.x", offsets: offsetsAt(bound), checked },
    ...{ indexLength, fromLength, index: foldGrid(groups(count * cap)).index, clearIndex: foldGrid(clearGroups).index },
  };
  return kernel(spec, [clear, entry, ends], [render("wgsl/merge_rows.wgsl", values)]);
}

/** WGSL kernels around collectives. */
export const transport = {
  arrange: wgslKernel(ops.arrange, arrange),
  take_rows: wgslKernel(ops.takeRows, takeRows),
  invert_rows: wgslKernel(ops.invertRows, invertRows),
  split_rows: wgslKernel(ops.splitRows, splitRows),
  merge_rows: wgslKernel(ops.mergeRows, mergeRows),
};
