/** What stands around a collective: blocks in another order, rows by destination, and lists of rows put together. */
import { render } from "../../../templates/bindings.ts";
import { destinationsOf, type Made, numbered, offsetsAt, type Use } from "../kernelSpec.ts";
import { type Binding, type Entry, fold, kernel, scalar, vector, widthOf } from "./text.ts";

const THREADS = 256;

/** The dims in which this rank's part is picked, and the sum of where they begin, of type u32 or i32, in steps of `width`. */
function picked(use: Use, type: "u32" | "i32", width = 1): { starts: string[]; first: string } {
  const starts = numbered(use, "@").map((_, i) => `@${i}`);
  const sum = starts.map((_, i) => `start.${"xyzw"[i]}`).join(" + ");
  return { starts, first: starts.length ? `${type}((${sum}) / ${width})` : type === "u32" ? "0u" : "0" };
}

function arrange(use: Use): Made {
  const [sizes, strides] = [numbered(use, "n"), numbered(use, "s")];
  const inner = sizes.length - 1;
  const width = strides[inner] === 1 ? widthOf(sizes[inner]!, ...strides.slice(0, -1), ...numbered(use, "@")) : 1;
  const dims = sizes.map((size, i) => ({
    size: i === inner ? size / width : size,
    stride: i === inner ? strides[i]! : strides[i]! / width,
  }));
  const vectors = use.size.y! / width;
  const type = vector(scalar(use.dtype.x!), width);
  const { starts, first } = picked(use, "u32", width);
  const { index } = fold(Math.ceil(vectors / THREADS));
  const buffers: Binding[] = ["x", "y"].map((arg) => ({ arg, type }));
  const entry: Entry = { entry: use.name, grid: Math.ceil(vectors / THREADS), threads: THREADS, buffers, starts };
  const values = { op: use.op, entry: use.name, threads: THREADS, width, index, vectors, first, dims: dims.toReversed() };
  return kernel(use, [entry], [render("wgsl/arrange.wgsl", values)]);
}

function takeRows(use: Use): Made {
  const width = widthOf(use.d.width!);
  const vectors = use.d.width! / width;
  const total = use.d.N! * vectors;
  const type = vector(scalar(use.dtype.x!), width);
  const buffers: Binding[] = [
    { arg: "x", type },
    { arg: "from", name: "rows_from", type: "i32" },
    { arg: "y", type },
  ];
  const groups = Math.ceil(total / THREADS);
  const values = { op: use.op, entry: use.name, threads: THREADS, width, vectors, total, index: fold(groups).index };
  return kernel(use, [{ entry: use.name, grid: groups, threads: THREADS, buffers }], [render("wgsl/take_rows.wgsl", values)]);
}

function invertRows(use: Use): Made {
  const [sources, targets] = [use.size.from!, use.size.to!];
  const groups = (n: number) => Math.ceil(n / THREADS);
  const clear: Entry = {
    entry: `${use.name}_clear`,
    grid: groups(targets),
    threads: THREADS,
    buffers: [{ arg: "to", name: "cleared", type: "i32" }],
  };
  const entry: Entry = {
    entry: use.name,
    grid: groups(sources),
    threads: THREADS,
    buffers: [
      { arg: "from", name: "rows_from", type: "i32" },
      { arg: "to", name: "rows_to", type: "i32" },
    ],
  };
  const values = {
    ...{ op: use.op, clear: clear.entry, entry: use.name, threads: THREADS, sources, targets },
    ...{ index: fold(groups(sources)).index, clearIndex: fold(groups(targets)).index },
  };
  return kernel(use, [clear, entry], [render("wgsl/invert_rows.wgsl", values)]);
}

const needed: Binding = { arg: "needed", type: "i32" };

function splitRows(use: Use): Made {
  const cap = use.d.cap!;
  const length = 1 + 3 * cap;
  const factors = destinationsOf(use);
  const checked = use.dtype.needed !== undefined;
  const entry: Entry = {
    entry: use.name,
    grid: [use.size.lists! / length, 1, 1],
    threads: THREADS,
    buffers: [
      { arg: "index", type: "i32" },
      { arg: "lists", type: "i32" },
      { arg: "from", name: "rows_from", type: "i32" },
      ...(checked ? [{ ...needed, type: "atomic<i32>" }] : []),
    ],
  };
  // of an index no longer than this
  const rows = Math.floor((use.size.index! - 1) / 3);
  const values = { op: use.op, entry: use.name, threads: THREADS, rows, factors, cap, length, checked };
  return kernel(use, [entry], [render("wgsl/split_rows.wgsl", values)]);
}

function mergeRows(use: Use): Made {
  const { count, length, cap, bound, E } = use.d as Readonly<Record<"count" | "length" | "cap" | "bound" | "E", number>>;
  const { starts, first } = picked(use, "i32");
  const checked = use.dtype.needed !== undefined;
  const groups = (n: number) => Math.ceil(n / THREADS);
  const [indexLength, fromLength] = [use.size.index!, use.size.from!];
  const clear: Entry = {
    entry: `${use.name}_clear`,
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
  const entry: Entry = {
    entry: use.name,
    grid: groups(count * cap),
    threads: THREADS,
    buffers: [...lists, { arg: "from", name: "rows_from", type: "i32" }],
    starts,
  };
  const ends: Entry = {
    entry: `${use.name}_ends`,
    grid: [1, 1, 1],
    threads: THREADS,
    buffers: [...lists, ...(checked ? [needed] : [])],
    starts: ["E", ...starts],
    uniform: "ends_start",
  };
  const endsFirst = starts.length ? starts.map((_, i) => `ends_start.${"xyzw"[i + 1]}`).join(" + ") : "0";
  const values = {
    ...{ op: use.op, prefix: use.name, clear: clear.entry, entry: use.name, ends: ends.entry, threads: THREADS },
    ...{ count, length, cap, bound, experts: E, first, endsFirst, firstExpert: "ends_start.x", offsets: offsetsAt(bound), checked },
    ...{ indexLength, fromLength, index: fold(groups(count * cap)).index, clearIndex: fold(clear.grid as number).index },
  };
  return kernel(use, [clear, entry, ends], [render("wgsl/merge_rows.wgsl", values)]);
}

export const messages = { arrange, take_rows: takeRows, invert_rows: invertRows, split_rows: splitRows, merge_rows: mergeRows };
