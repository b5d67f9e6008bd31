/** What stands around a collective: blocks in another order, rows by destination, and lists of rows put together. */
import { render } from "../../../templates/bindings.ts";
import { destinationsOf, type GeneratedKernel, type KernelSpec, numbered, offsetsAt } from "../kernelSpec.ts";
import { type Binding, type EntryPoint, foldGrid, kernel, scalar, vector, widthOf } from "./text.ts";

const THREADS = 256;

/** The dims in which this rank's part is picked, and the sum of where they begin, of type u32 or i32, in steps of `width`. */
function picked(spec: KernelSpec, type: "u32" | "i32", width = 1): { starts: string[]; first: string } {
  const starts = numbered(spec, "@").map((_, i) => `@${i}`);
  const sum = starts.map((_, i) => `start.${"xyzw"[i]}`).join(" + ");
  return { starts, first: starts.length ? `${type}((${sum}) / ${width})` : type === "u32" ? "0u" : "0" };
}

function arrange(spec: KernelSpec): GeneratedKernel {
  const [sizes, strides] = [numbered(spec, "n"), numbered(spec, "s")];
  const inner = sizes.length - 1;
  const width = strides[inner] === 1 ? widthOf(sizes[inner]!, ...strides.slice(0, -1), ...numbered(spec, "@")) : 1;
  const dims = sizes.map((size, i) => ({
    size: i === inner ? size / width : size,
    stride: i === inner ? strides[i]! : strides[i]! / width,
  }));
  const vectors = spec.size.y! / width;
  const type = vector(scalar(spec.dtype.x!), width);
  const { starts, first } = picked(spec, "u32", width);
  const { index } = foldGrid(Math.ceil(vectors / THREADS));
  const buffers: Binding[] = ["x", "y"].map((arg) => ({ arg, type }));
  const entry: EntryPoint = { entry: spec.name, grid: Math.ceil(vectors / THREADS), threads: THREADS, buffers, starts };
  const values = { op: spec.op, entry: spec.name, threads: THREADS, width, index, vectors, first, dims: dims.toReversed() };
  return kernel(spec, [entry], [render("wgsl/arrange.wgsl", values)]);
}

function takeRows(spec: KernelSpec): GeneratedKernel {
  const width = widthOf(spec.d.width!);
  const vectors = spec.d.width! / width;
  const total = spec.d.N! * vectors;
  const type = vector(scalar(spec.dtype.x!), width);
  const buffers: Binding[] = [
    { arg: "x", type },
    { arg: "from", name: "rows_from", type: "i32" },
    { arg: "y", type },
  ];
  const groups = Math.ceil(total / THREADS);
  const values = { op: spec.op, entry: spec.name, threads: THREADS, width, vectors, total, index: foldGrid(groups).index };
  return kernel(spec, [{ entry: spec.name, grid: groups, threads: THREADS, buffers }], [render("wgsl/take_rows.wgsl", values)]);
}

function invertRows(spec: KernelSpec): GeneratedKernel {
  const [sources, targets] = [spec.size.from!, spec.size.to!];
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

function splitRows(spec: KernelSpec): GeneratedKernel {
  const cap = spec.d.cap!;
  const length = 1 + 3 * cap;
  const factors = destinationsOf(spec);
  const checked = spec.dtype.needed !== undefined;
  const entry: EntryPoint = {
    entry: spec.name,
    grid: [spec.size.lists! / length, 1, 1],
    threads: THREADS,
    buffers: [
      { arg: "index", type: "i32" },
      { arg: "lists", type: "i32" },
      { arg: "from", name: "rows_from", type: "i32" },
      ...(checked ? [{ ...needed, type: "atomic<i32>" }] : []),
    ],
  };
  // of an index no longer than this
  const rows = Math.floor((spec.size.index! - 1) / 3);
  const values = { op: spec.op, entry: spec.name, threads: THREADS, rows, factors, cap, length, checked };
  return kernel(spec, [entry], [render("wgsl/split_rows.wgsl", values)]);
}

function mergeRows(spec: KernelSpec): GeneratedKernel {
  const { count, length, cap, bound, E } = spec.d as Readonly<Record<"count" | "length" | "cap" | "bound" | "E", number>>;
  const { starts, first } = picked(spec, "i32");
  const checked = spec.dtype.needed !== undefined;
  const groups = (n: number) => Math.ceil(n / THREADS);
  const [indexLength, fromLength] = [spec.size.index!, spec.size.from!];
  const clear: EntryPoint = {
    entry: `${spec.name}_clear`,
    grid: groups(Math.max(indexLength, fromLength)),
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
  const endsFirst = starts.length ? starts.map((_, i) => `ends_start.${"xyzw"[i + 1]}`).join(" + ") : "0";
  const values = {
    ...{ op: spec.op, prefix: spec.name, clear: clear.entry, entry: spec.name, ends: ends.entry, threads: THREADS },
    ...{ count, length, cap, bound, experts: E, first, endsFirst, firstExpert: "ends_start.x", offsets: offsetsAt(bound), checked },
    ...{ indexLength, fromLength, index: foldGrid(groups(count * cap)).index, clearIndex: foldGrid(clear.grid as number).index },
  };
  return kernel(spec, [clear, entry, ends], [render("wgsl/merge_rows.wgsl", values)]);
}

export const messages = { arrange, take_rows: takeRows, invert_rows: invertRows, split_rows: splitRows, merge_rows: mergeRows };
