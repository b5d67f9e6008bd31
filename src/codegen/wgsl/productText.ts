/** What the kernels of products share, however they multiply: bindings, where a workgroup's tile is, loads and stores with their guards. */
import { render } from "../../../templates/bindings.ts";
import { type GeneratedKernel, offsetsAt } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import type { Side, Tile, WgslProduct, WgslTiling } from "./product.ts";
import { bound, type EntryPoint, foldGrid, header, scalar, scratchBytes, vector } from "./text.ts";

export type OperandName = "a" | "b";

/** How one way of multiplying a tile fits into the kernel. */
export interface ProductVariant {
  readonly threads: number;
  /** The type in which operands reach workgroup memory. */
  readonly stage: "f32" | "f16";
  /** Operands in f16 are brought in runs of 8, 16 bytes, where no run crosses the end of a dim. */
  readonly wide?: boolean;
  /** Directives beyond `enable f16`. */
  readonly directives?: string;
  /** The i-th word of workgroup memory, and a vec4<f32> there: tiles of experts are found through them. */
  readonly words: { readonly border: string; readonly found: string };
  /** The text of the entry. */
  main(frame: Frame): string;
}
/** What the entry's text is given. `span` is the last argument of loads and stores. */
interface Frame {
  readonly name: string;
  readonly threads: number;
  readonly index: string;
  readonly places: number;
  readonly place: string;
  readonly span: string;
}
interface Store {
  readonly name: string;
  readonly dtype: WgslProduct["out"]["dtype"];
  readonly adds: boolean;
}

const SUM_THREADS = 256;

export function productKernel(p: WgslProduct, t: WgslTiling<Tile>, way: ProductVariant): GeneratedKernel {
  const { name } = p.spec;
  const places = t.layers * t.down * t.across;
  const split = t.parts > 1;
  const to: Store = split ? { name: "partial", dtype: "f32", adds: false } : p.out;
  const run = p.n % 4 === 0 ? 4 : 1;
  const operand = (side: Side) => ({
    arg: side.name,
    type: isWide(p, side, way) ? "vec4<u32>" : vector(scalar(side.dtype), runOf(p, side)),
  });
  const product: EntryPoint = {
    entry: name,
    grid: places,
    threads: way.threads,
    buffers: [
      operand(p.a),
      operand(p.b),
      { arg: split ? scratchStart : p.out.name, name: to.name, type: vector(scalar(to.dtype), run) },
      ...(p.by === "dense" ? [] : [{ arg: "rows", type: "i32" }]),
    ],
  };
  const count = (p.m * p.n) / run;
  const sum: EntryPoint = {
    entry: `${name}_sum`,
    grid: Math.ceil(count / SUM_THREADS),
    threads: SUM_THREADS,
    buffers: [
      { arg: scratchStart, name: "partials", type: vector("f32", run) },
      { arg: p.out.name, type: vector(scalar(p.out.dtype), run) },
    ],
  };
  const entries = split ? [product, sum] : [product];
  const grouped = p.by !== "dense";
  const frame = {
    name,
    threads: way.threads,
    index: foldGrid(places).index,
    places,
    place: placeText(p, t, way),
    span: grouped ? ", span" : "",
  };
  const { bindings, launches } = bound(entries);
  const source = render("wgsl/product.wgsl", {
    ...{ header: header(p.spec.dtype) + (way.directives ?? ""), bindings, name },
    loaders: [loader(p, t, "a", way), loader(p, t, "b", way)],
    ...{ spanParameter: grouped ? ", span: vec2<u32>" : "", ...store(p, t, to), main: way.main(frame).trimEnd() },
    ...{ split, parts: t.parts, sumThreads: SUM_THREADS, sumCount: count, sumIndex: foldGrid(Math.ceil(count / SUM_THREADS)).index },
    sumStore: put(p.out, "i", "sum", run),
  });
  return { source, launches, ...(split ? { scratch: scratchBytes(t.parts * p.m * p.n) } : {}) };
}

/** Rows of tiles that are gone down before the next column: with 8, 128 tiles in flight read 24 panels rather than 129. */
const BAND = 8;

/**
 * Text that finds, from `place` and `l`, this workgroup's tile: `m0`, `n0` (its first row and column), `begin`, `end` (its depth),
 * `at` (where its matrix begins in the output) and, for experts, `span` (the expert, and the end of its rows).
 */
const placeText = ({ m, n, k, by, experts, spec }: WgslProduct, t: WgslTiling<Tile>, { threads, words }: ProductVariant): string =>
  render("wgsl/product_place.wgsl", {
    ...words,
    ...{ band: BAND, bandTiles: BAND * t.across, down: t.down, tiles: t.down * t.across },
    ...{ bm: t.tile.bm, bn: t.tile.bn, area: m * n, depth: k, slice: t.slice, experts, threads, offsets: offsetsAt(spec.bound) },
    ...{ dense: by === "dense", byRows: by === "rows", byDepth: by === "depth" },
  }).trimEnd();

/** The widest run of 1 or 4 elements that never crosses the end of a dim. */
const runOf = (p: WgslProduct, side: Side): 1 | 4 => (alongOf(p, side) % 4 === 0 ? 4 : 1);
const alongOf = (p: WgslProduct, side: Side): number => (side.along === "deep" ? p.k : side.lanes);

/** Whether an operand is read as words of 8 halves. */
export const isWide = (p: WgslProduct, side: Side, { wide = false }: Pick<ProductVariant, "wide">): boolean =>
  wide && side.dtype === "f16" && alongOf(p, side) % 8 === 0;

function loader(p: WgslProduct, { tile }: WgslTiling<Tile>, letter: OperandName, way: ProductVariant) {
  const type = way.stage;
  const side = p[letter];
  const { name } = side;
  const ragged = p.by === "rows" && letter === "a";
  const end = p.by === "depth" ? "span.y" : `${p.k}u`;
  const own = p.by === "rows" && letter === "b" ? `span.x * ${p.k * p.n}u + ` : "";
  const index = (lane: string, deep: string) =>
    side.along === "deep" ? `${own}${lane} * ${p.k}u + ${deep}` : `${own}${deep} * ${side.lanes}u + ${lane}`;
  // lanes past the end are read as the last ones
  const cut = ragged || side.lanes % (letter === "a" ? tile.bm : tile.bn) !== 0;
  const within = (lane: string, last: number) => (cut ? `min(${lane}, ${ragged ? `span.y - ${last}u` : `${side.lanes - last}u`})` : lane);
  const one = (i: number) => {
    if (side.along === "lane") return `${type}(${name}[${index(within(i ? `lane + ${i}u` : "lane", 1), "deep")}])`;
    const element = (deep: string) => `${type}(${name}[${index(within("lane", 1), deep)}])`;
    return i ? `select(${type}(), ${element(`min(deep + ${i}u, ${p.k - 1}u)`)}, deep + ${i}u < ${end})` : element("deep");
  };
  const wide = isWide(p, side, way);
  const run = wide ? 8 : runOf(p, side);
  const inside =
    run > 1 ? `${name}[(${index(within("lane", side.along === "lane" ? run : 1), "deep")}) / ${run}u]` : [0, 1, 2, 3].map(one).join(", ");
  const returns = wide ? "vec4<u32>" : vector(type, 4);
  return {
    ...{
      operand: name,
      side: letter,
      guarded: p.by === "depth" || p.k % tile.bk !== 0,
      end,
      type: returns,
      count: wide ? "eight" : "four",
    },
    value: wide ? inside : `${returns}(${inside})`,
  };
}

function store(p: WgslProduct, { tile }: WgslTiling<Tile>, to: Store) {
  const outside = [
    ...(p.by === "rows" ? ["row >= span.y"] : p.m % tile.bm ? [`row >= ${p.m}u`] : []),
    ...(p.n % tile.bn ? [`column >= ${p.n}u`] : []),
  ];
  const index = `at + row * ${p.n}u + column`;
  const one = (c: string, i: number) => {
    const text = put(to, i ? `${index} + ${i}u` : index, `sum.${c}`, 1);
    return i ? `  if (column + ${i}u < ${p.n}u) { ${text} }` : `  ${text}`;
  };
  const stores = p.n % 4 === 0 ? [`  ${put(to, `(${index}) / 4u`, "sum", 4)}`] : ["x", "y", "z", "w"].map(one);
  return { guarded: outside.length > 0, outside: outside.join(" || "), stores: stores.join("\n") };
}

/** One element or run of `to` at `index` is set to, or has added, an f32 value. */
function put({ name, dtype, adds }: Store, index: string, value: string, run: number): string {
  const at = `${name}[${index}]`;
  const sum = adds ? `${dtype === "f32" ? at : `${vector("f32", run)}(${at})`} + ${value}` : value;
  return `${at} = ${dtype === "f32" ? sum : `${vector(scalar(dtype), run)}(${sum})`};`;
}
