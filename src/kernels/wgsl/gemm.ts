/**
 * The product on plain multipliers: every thread holds 4 to 8 by 4 to 8 sums in registers and reads both operands from tiles in
 * workgroup memory. Sums are f32. Odd sizes are right; where sizes divide, nothing is checked.
 */
import { render } from "../../../templates/bindings.ts";
import type { Made } from "../kernel.ts";
import { indexOf, type Product, placeText, runOf, type Side, type Tile, type Tiling, tilingOf } from "./product.ts";
import { bindings, type Entry, fold, header, launch, scalar, vector } from "./text.ts";

/** Rows and columns of the output that one thread holds: runs of 4, spread evenly over the tile. */
interface Share {
  readonly rm: number;
  readonly rn: number;
  /** Steps of the depth written out one after the other. Sums of few steps are short sources, which software adapters compile fast. */
  readonly unrolled: number;
}
// efficiencies are estimates but for their order: 8 x 8 sums per thread take 4 reads for 64 multiply-adds, 4 x 4 take 2 for 16
const TILES: readonly (Tile & Share)[] = [
  { bm: 128, bn: 128, bk: 8, rm: 8, rn: 8, unrolled: 8, efficiency: 0.7 },
  { bm: 64, bn: 64, bk: 8, rm: 8, rn: 4, unrolled: 8, efficiency: 0.5 },
  { bm: 32, bn: 32, bk: 16, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
  { bm: 64, bn: 16, bk: 16, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
  { bm: 16, bn: 64, bk: 16, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
];
const SUM_THREADS = 256;

export function gemm(p: Product): Made {
  const t = tilingOf(p, TILES);
  const { bm, bn, bk, rm, rn } = t.tile;
  const across = bn / rn;
  const threads = (bm / rm) * across;
  const places = t.layers * t.down * t.across;
  const split = t.parts > 1;
  const to: Store = split ? { name: "partial", dtype: "f32", adds: false } : p.out;
  const run = p.n % 4 === 0 ? 4 : 1;
  const operand = (side: Side) => ({ arg: side.name, type: vector(scalar(side.dtype), runOf(p, side)) });
  const main: Entry = {
    entry: p.use.name,
    grid: places,
    threads,
    buffers: [
      operand(p.a),
      operand(p.b),
      { arg: split ? "scratch+0" : p.out.name, name: to.name, type: vector(scalar(to.dtype), run) },
      ...(p.by === "dense" ? [] : [{ arg: "rows", type: "i32" }]),
    ],
  };
  const count = (p.m * p.n) / run;
  const sum: Entry = {
    entry: `${p.use.name}_sum`,
    grid: Math.ceil(count / SUM_THREADS),
    threads: SUM_THREADS,
    buffers: [
      { arg: "scratch+0", name: "partials", type: vector("f32", run) },
      { arg: p.out.name, type: vector(scalar(p.out.dtype), run) },
    ],
  };
  const entries = split ? [main, sum] : [main];
  const half = ((bm + bn) * bk) / 4;
  const source = render("wgsl/gemm.wgsl", {
    ...{ header: header(p.use.dtype), bindings: bindings(...entries), name: p.use.name, threads, bk, half, words: 2 * half, across },
    ...{ index: fold(places).index, places, place: placeText(p, t, threads, { border: "tiles[i / 4u][i % 4u]", found: "tiles[0]" }) },
    loaders: [loader(p, t, "a"), loader(p, t, "b")],
    ...{ spanParameter: p.by === "dense" ? "" : ", span: vec2<u32>", spanArgument: p.by === "dense" ? "" : ", span" },
    ...store(p, t, to),
    fetches: [...fetches(p, t, "a", threads), ...fetches(p, t, "b", threads)],
    ...registers(t),
    ...{ split, parts: t.parts, sumThreads: SUM_THREADS, sumCount: count, sumIndex: fold(sum.grid as number).index },
    sumStore: put(p.out, "i", "sum", run),
  });
  return { source, launches: entries.map(launch), ...(split ? { scratch: t.parts * p.m * p.n * 4 } : {}) };
}

type Plain = Tiling<Tile & Share>;
type Letter = "a" | "b";
interface Store {
  readonly name: string;
  readonly dtype: Product["out"]["dtype"];
  readonly adds: boolean;
}

/** One element or run of `to` at `index` is set to, or has added, an f32 value. */
function put({ name, dtype, adds }: Store, index: string, value: string, run: number): string {
  const sum = adds ? `${dtype === "f32" ? `${name}[${index}]` : `${vector("f32", run)}(${name}[${index}])`} + ${value}` : value;
  return `${name}[${index}] = ${dtype === "f32" ? sum : `${vector(scalar(dtype), run)}(${sum})`};`;
}

function loader(p: Product, { tile }: Plain, letter: Letter) {
  const side = p[letter];
  const { name } = side;
  const ragged = p.by === "rows" && letter === "a";
  const ends = p.by === "depth" ? "span.y" : `${p.k}u`;
  // lanes past the end are read as the last ones: their sums are never stored
  const last = (back: number) => (ragged ? `span.y - ${back}u` : `${side.lanes - back}u`);
  const cut = ragged || side.lanes % (letter === "a" ? tile.bm : tile.bn) !== 0;
  const lane = (text: string, back: number) => (cut ? `min(${text}, ${last(back)})` : text);
  const step = (base: string, i: number) => (i ? `${base} + ${i}u` : base);
  const one = (i: number) =>
    side.along === "lane"
      ? `f32(${name}[${indexOf(p, side, lane(step("lane", i), 1), "deep")}])`
      : i
        ? `select(0.0, f32(${name}[${indexOf(p, side, lane("lane", 1), `min(deep + ${i}u, ${p.k - 1}u)`)}]), deep + ${i}u < ${ends})`
        : `f32(${name}[${indexOf(p, side, lane("lane", 1), "deep")}])`;
  const value =
    runOf(p, side) === 4
      ? `vec4<f32>(${name}[(${indexOf(p, side, lane("lane", side.along === "lane" ? 4 : 1), "deep")}) / 4u])`
      : `vec4<f32>(${[0, 1, 2, 3].map(one).join(", ")})`;
  return { operand: name, side: letter, guarded: p.by === "depth" || p.k % tile.bk !== 0, end: ends, value };
}

function store(p: Product, { tile }: Plain, to: Store) {
  const outside = [
    ...(p.by === "rows" ? ["row >= span.y"] : p.m % tile.bm ? [`row >= ${p.m}u`] : []),
    ...(p.n % tile.bn ? [`column >= ${p.n}u`] : []),
  ];
  const index = `at + row * ${p.n}u + column`;
  const stores =
    p.n % 4 === 0
      ? [`  ${put(to, `(${index}) / 4u`, "sum", 4)}`]
      : ["x", "y", "z", "w"].map((c, i) => {
          const text = put(to, i ? `${index} + ${i}u` : index, `sum.${c}`, 1);
          return i ? `  if (column + ${i}u < ${p.n}u) { ${text} }` : `  ${text}`;
        });
  return { guarded: outside.length > 0, outside: outside.join(" || "), stores: stores.join("\n") };
}

/** What each thread brings from an operand per step of the depth: runs of four as they lie, put into words of four lanes. */
function fetches(p: Product, { tile: { bm, bn, bk } }: Plain, letter: Letter, threads: number) {
  const lanes = letter === "a" ? bm : bn;
  const base = letter === "a" ? 0 : (bm * bk) / 4;
  const along = p[letter].along;
  return Array.from({ length: (lanes * bk) / 4 / threads }, (_, j) => {
    const name = `${letter}${j}`;
    const i = `(l + ${j * threads}u)`;
    const text =
      along === "deep"
        ? { lane: `${i} / ${bk / 4}u`, deep: `${i} % ${bk / 4}u * 4u` }
        : { lane: `${i} % ${lanes / 4}u * 4u`, deep: `${i} / ${lanes / 4}u` };
    const word = `now + ${name}_to`;
    const puts =
      along === "lane"
        ? [{ to: `tiles[${word}]`, value: name }]
        : ["x", "y", "z", "w"].map((c, q) => ({
            to: `tiles[${word} + ${(q * lanes) / 4}u][${i} / ${bk / 4}u % 4u]`,
            value: `${name}.${c}`,
          }));
    const to = along === "lane" ? `${base}u + ${i}` : `${base}u + ${name}_deep * ${lanes / 4}u + ${i} / ${bk / 4}u / 4u`;
    return { name, side: letter, first: letter === "a" ? "m0" : "n0", ...text, to, puts };
  });
}

/** The sums of one thread, what a step of the depth adds to them, and where they go in the end. */
function registers({ tile: { bm, bn, bk, rm, rn, unrolled } }: Plain) {
  const down = Array.from({ length: rm / 4 }, (_, h) => h);
  const across = Array.from({ length: rn / 4 }, (_, h) => h);
  const all = down.flatMap((h) => ["x", "y", "z", "w"].flatMap((c, i) => across.map((g) => ({ h, c, i, g, sum: `sum${4 * h + i}_${g}` }))));
  const base = (bm * bk) / 4;
  return {
    sums: all.map(({ sum }) => sum),
    unrolled,
    wordsDown: bm / 4,
    wordsAcross: bn / 4,
    steps: Array.from({ length: unrolled }, (_, d) => ({
      reads: [
        ...down.map((h) => ({ name: `a${h}`, at: `down + ${(d * bm) / 4 + (h * bm) / rm}u` })),
        ...across.map((g) => ({ name: `b${g}`, at: `across + ${base + (d * bn) / 4 + (g * bn) / rn}u` })),
      ],
    })),
    products: all.map(({ h, c, g, sum }) => ({ sum, a: `a${h}.${c}`, b: `b${g}` })),
    results: all.map(({ h, i, g, sum }) => ({
      sum,
      row: `${(h * bm * 4) / rm + i}u + ty * 4u`,
      column: `${(g * bn * 4) / rn}u + tx * 4u`,
    })),
  };
}
