import type { Dtype } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { rowIndex, scratchStart } from "../launchArgs.ts";
import type { MatrixProduct } from "../matmul.ts";
import type { Tile, WgslTiling } from "./matmul.ts";
import { bound, type EntryPoint, foldGrid, header, scalar, scratchBytes, vector } from "./text.ts";

/** An operand of a product. */
export type ProductSide = "a" | "b";

/** How a kernel multiplies a tile. */
export interface ProductVariant {
  readonly threads: number;
  /** The type in which operands reach workgroup memory. */
  readonly stage: "f32" | "f16";
  /** Operands in f16 are loaded in runs of 8 (16 bytes) if no run crosses the end of a dim. */
  readonly wide?: boolean;
  /** Directives beyond `enable f16`. */
  readonly directives?: string;
  /** Expressions for the i-th word of workgroup memory and for a vec4<f32> there, which the search for the tile of an expert uses. */
  readonly words: { readonly border: string; readonly found: string };
  /** The text of the entry. */
  main(frame: Frame): string;
}
/** Values for the text of the entry. `span` is the last argument of loads and stores. */
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
  readonly dtype: Dtype;
  readonly adds: boolean;
}

const SUM_THREADS = 256;

/** Returns the kernel of a product: the text that both variants share, filled with that of one. */
export function productKernel(spec: KernelSpec, p: MatrixProduct, t: WgslTiling<Tile>, way: ProductVariant): GeneratedKernel {
  const { name } = spec;
  const places = t.layers * t.down * t.across;
  const split = t.parts > 1;
  const out: Store = { ...p.c, adds: p.adds };
  const to: Store = split ? { name: "partial", dtype: "f32", adds: false } : out;
  const run = p.n % 4 === 0 ? 4 : 1;
  const operand = (letter: ProductSide) => ({
    arg: p[letter].name,
    type: isWide(p, letter, way) ? "vec4<u32>" : vector(scalar(p[letter].dtype), runOf(p, letter)),
  });
  const product: EntryPoint = {
    entry: name,
    grid: places,
    threads: way.threads,
    buffers: [
      operand("a"),
      operand("b"),
      { arg: split ? scratchStart : out.name, name: to.name, type: vector(scalar(to.dtype), run) },
      ...(p.ragged ? [{ arg: rowIndex, type: "i32" }] : []),
    ],
  };
  const count = (p.m * p.n) / run;
  const sum: EntryPoint = {
    entry: `${name}_sum`,
    grid: Math.ceil(count / SUM_THREADS),
    threads: SUM_THREADS,
    buffers: [
      { arg: scratchStart, name: "partials", type: vector("f32", run) },
      { arg: out.name, type: vector(scalar(out.dtype), run) },
    ],
  };
  const entries = split ? [product, sum] : [product];
  const grouped = p.ragged !== undefined;
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
    ...{ header: header(spec.dtype) + (way.directives ?? ""), bindings, name },
    loaders: [loader(p, t, "a", way), loader(p, t, "b", way)],
    ...{ spanParameter: grouped ? ", span: vec2<u32>" : "", ...store(p, t, to), main: way.main(frame).trimEnd() },
    ...{ split, parts: t.parts, sumThreads: SUM_THREADS, sumCount: count, sumIndex: foldGrid(Math.ceil(count / SUM_THREADS)).index },
    sumStore: put(out, "i", "sum", run),
  });
  return { source, launches, ...(split ? { scratch: scratchBytes(t.parts * p.m * p.n) } : {}) };
}

/** Tiles per column of a band: with 8, 128 concurrent tiles read 24 panels rather than 129. */
const BAND = 8;

/**
 * Returns statements that compute the tile of this workgroup from `place` and `l`: `m0`, `n0` (its first row and column), `begin`, `end`
 * (its depth), `at` (the first element of its matrix in the output) and, for experts, `span` (the expert, and the end of its rows).
 */
const placeText = (
  { m, n, depth, ragged, experts, offsets }: MatrixProduct,
  t: WgslTiling<Tile>,
  { threads, words }: ProductVariant,
): string =>
  render("wgsl/product_place.wgsl", {
    ...words,
    ...{ band: BAND, bandTiles: BAND * t.across, down: t.down, tiles: t.down * t.across },
    ...{ bm: t.tile.bm, bn: t.tile.bn, area: m * n, depth, slice: t.slice, experts, threads, offsets },
    ...{ dense: ragged === undefined, byRows: ragged === "rows", byDepth: ragged === "depth" },
  }).trimEnd();

/** The widest run of 1 or 4 elements that never crosses the end of a dim. */
const runOf = (p: MatrixProduct, letter: ProductSide): 1 | 4 => (contiguousOf(p, letter) % 4 === 0 ? 4 : 1);
/** The size of the contiguous dim of an operand: the depth, or its lanes. */
const contiguousOf = (p: MatrixProduct, letter: ProductSide): number => (p[letter].depthFirst ? p.depth : lanesOf(p, letter));
/** The rows of a, or the columns of b. */
const lanesOf = (p: MatrixProduct, letter: ProductSide): number => (letter === "a" ? p.m : p.n);

/** Whether an operand is loaded as words of 8 f16 values. */
export const isWide = (p: MatrixProduct, letter: ProductSide, { wide = false }: Pick<ProductVariant, "wide">): boolean =>
  wide && p[letter].dtype === "f16" && contiguousOf(p, letter) % 8 === 0;

function loader(p: MatrixProduct, { tile }: WgslTiling<Tile>, letter: ProductSide, way: ProductVariant) {
  const type = way.stage;
  const { name, depthFirst } = p[letter];
  const lanes = lanesOf(p, letter);
  const ragged = p.ragged === "rows" && letter === "a";
  const end = p.ragged === "depth" ? "span.y" : `${p.depth}u`;
  const own = p.ragged === "rows" && letter === "b" ? `span.x * ${p.depth * p.n}u + ` : "";
  const index = (lane: string, deep: string) =>
    depthFirst ? `${own}${lane} * ${p.depth}u + ${deep}` : `${own}${deep} * ${lanes}u + ${lane}`;
  // lanes beyond the end read the last lane
  const cut = ragged || lanes % (letter === "a" ? tile.bm : tile.bn) !== 0;
  const within = (lane: string, last: number) => (cut ? `min(${lane}, ${ragged ? `span.y - ${last}u` : `${lanes - last}u`})` : lane);
  const one = (i: number) => {
    if (!depthFirst) return `${type}(${name}[${index(within(i ? `lane + ${i}u` : "lane", 1), "deep")}])`;
    const element = (deep: string) => `${type}(${name}[${index(within("lane", 1), deep)}])`;
    return i ? `select(${type}(), ${element(`min(deep + ${i}u, ${p.depth - 1}u)`)}, deep + ${i}u < ${end})` : element("deep");
  };
  const wide = isWide(p, letter, way);
  const run = wide ? 8 : runOf(p, letter);
  const inside =
    run > 1 ? `${name}[(${index(within("lane", !depthFirst ? run : 1), "deep")}) / ${run}u]` : [0, 1, 2, 3].map(one).join(", ");
  const returns = wide ? "vec4<u32>" : vector(type, 4);
  return {
    ...{
      operand: name,
      side: letter,
      guarded: p.ragged === "depth" || p.depth % tile.bk !== 0,
      end,
      type: returns,
      count: wide ? "eight" : "four",
    },
    value: wide ? inside : `${returns}(${inside})`,
  };
}

function store(p: MatrixProduct, { tile }: WgslTiling<Tile>, to: Store) {
  const outside = [
    ...(p.ragged === "rows" ? ["row >= span.y"] : p.m % tile.bm ? [`row >= ${p.m}u`] : []),
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

/** Returns the statement that stores an f32 value in one element or run of `to`, or adds it. */
function put({ name, dtype, adds }: Store, index: string, value: string, run: number): string {
  const at = `${name}[${index}]`;
  const sum = adds ? `${dtype === "f32" ? at : `${vector("f32", run)}(${at})`} + ${value}` : value;
  return `${at} = ${dtype === "f32" ? sum : `${vector(scalar(dtype), run)}(${sum})`};`;
}
