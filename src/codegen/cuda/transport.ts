/** What stands around a collective: blocks in another order, rows by destination, and lists of rows put together. */
import type { Arg, Launch } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { destinationsOf, type Made, numbered, offsetsAt, type Use } from "../kernelSpec.ts";
import { cudaType, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

const THREADS = 256;
const UNROLL = 4;
const INT_MAX = 2 ** 31 - 1;

const launch = (entry: string, items: number, each: number, args: Arg[]): Launch => ({
  entry,
  grid: [Math.max(1, Math.ceil(items / each)), 1, 1],
  threads: THREADS,
  shared: 0,
  args,
});
const divisor = (a: number, b: number): number => (b === 0 ? a : divisor(b, a % b));
/** Names of the parameters that say where this rank's part begins, and the arguments that fill them. */
const picked = (use: Use) => {
  const dims = numbered(use, "@");
  return { starts: dims.map((_, i) => `start${i}`), args: dims.map((_, i) => `start(@${i})`) };
};

function arrange(use: Use): Made {
  const [sizes, strides] = [numbered(use, "n"), numbered(use, "s")];
  const inner = sizes.length - 1;
  const width =
    strides[inner] === 1 ? vectorOf([sizes[inner]!, ...strides.slice(0, -1), ...numbered(use, "@")].reduce(divisor), [use.dtype.x!]) : 1;
  const dims = sizes.map((size, i) => (i === inner ? { size: size / width, stride: strides[i]! * width } : { size, stride: strides[i]! }));
  const vectors = use.size.y! / width;
  const { starts, args } = picked(use);
  const values = {
    ...{ name: use.name, type: cudaType(use.dtype.x!), width, unroll: UNROLL, threads: THREADS, vectors, starts },
    ...{ index: vectors + THREADS * UNROLL > INT_MAX ? "i64" : "int", dims: dims.toReversed() },
  };
  return {
    source: source(use, render("cuda/arrange.cu", values)),
    launches: [launch(use.name, vectors, THREADS * UNROLL, ["x", "y", ...args])],
  };
}

function takeRows(use: Use): Made {
  const width = vectorOf(use.d.width!, [use.dtype.x!]);
  const vectors = use.d.width! / width;
  const total = use.d.N! * vectors;
  const values = {
    ...{ name: use.name, type: cudaType(use.dtype.x!), width, unroll: UNROLL, threads: THREADS, vectors, total },
    index: total + THREADS * UNROLL > INT_MAX ? "i64" : "int",
  };
  return {
    source: source(use, render("cuda/take_rows.cu", values)),
    launches: [launch(use.name, total, THREADS * UNROLL, ["x", "from", "y"])],
  };
}

function invertRows(use: Use): Made {
  const [sources, targets] = [use.size.from!, use.size.to!];
  return {
    source: source(use, render("cuda/invert_rows.cu", { name: use.name, sources, targets })),
    launches: [launch(`${use.name}_clear`, targets, THREADS, ["to"]), launch(use.name, sources, THREADS, ["from", "to"])],
  };
}

function splitRows(use: Use): Made {
  const cap = use.d.cap!;
  const factors = destinationsOf(use);
  const checked = use.dtype.needed !== undefined;
  const lists = use.size.lists! / (1 + 3 * cap);
  return {
    source: source(use, render("cuda/split_rows.cu", { name: use.name, threads: THREADS, cap, factors, checked })),
    launches: [launch(use.name, lists, 1, ["index", "lists", "from", ...(checked ? ["needed"] : [])])],
  };
}

function mergeRows(use: Use): Made {
  const { count, length, cap, bound, E } = use.d as Readonly<Record<"count" | "length" | "cap" | "bound" | "E", number>>;
  const { starts, args } = picked(use);
  const checked = use.dtype.needed !== undefined;
  const [indexLength, fromLength] = [use.size.index!, use.size.from!];
  const values = {
    ...{ name: use.name, count, length, cap, bound, starts, checked, indexLength, fromLength },
    ...{ experts: E, offsets: offsetsAt(bound) },
  };
  return {
    source: source(use, render("cuda/merge_rows.cu", values)),
    launches: [
      launch(`${use.name}_clear`, Math.max(indexLength, fromLength), THREADS, ["index", "from"]),
      launch(use.name, count * cap, THREADS, ["lists", "index", "from", ...args]),
      launch(`${use.name}_ends`, 1, 1, ["lists", "index", ...(checked ? ["needed"] : []), "start(E)", ...args]),
    ],
  };
}

export const messages = { arrange, take_rows: takeRows, invert_rows: invertRows, split_rows: splitRows, merge_rows: mergeRows };
