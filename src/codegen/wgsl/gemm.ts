/**
 * The product on plain multipliers: every thread holds 4 x 4 or 8 x 8 sums in registers and reads both operands from tiles in
 * workgroup memory. Sums are f32. Odd sizes are right; where sizes divide, nothing is checked.
 */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel } from "../kernelSpec.ts";
import type { Tile, WgslProduct, WgslTiling } from "./product.ts";
import { type OperandName, productKernel } from "./productText.ts";

export interface PlainTile extends Tile {
  readonly by: "plain";
  /** Rows and columns of the output that one thread holds: runs of 4, spread evenly over the tile. */
  readonly rm: number;
  readonly rn: number;
  /** Steps of the depth written out one after the other. Sums of few steps are short sources, which software adapters compile fast. */
  readonly unrolled: number;
}
// efficiencies, of an H200's 67 TFLOP/s: 0.68 and 0.63 measured, the others estimates but for their order
export const plainTiles: readonly PlainTile[] = [
  { by: "plain", bm: 128, bn: 128, bk: 8, rm: 8, rn: 8, unrolled: 8, efficiency: 0.68 },
  { by: "plain", bm: 64, bn: 64, bk: 8, rm: 8, rn: 8, unrolled: 8, efficiency: 0.63 },
  { by: "plain", bm: 32, bn: 32, bk: 8, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
  { by: "plain", bm: 64, bn: 16, bk: 16, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
  { by: "plain", bm: 16, bn: 64, bk: 16, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
];

export function gemm(p: WgslProduct, t: WgslTiling<PlainTile>): GeneratedKernel {
  const { bm, bn, bk, rm, rn, unrolled } = t.tile;
  const threads = (bm / rm) * (bn / rn);
  const half = ((bm + bn) * bk) / 4;
  const into = (from: number) => [...fetches(p, t.tile, "a", threads, from), ...fetches(p, t.tile, "b", threads, from)];
  return productKernel(p, t, {
    ...{ threads, stage: "f32", words: { border: "tiles[i / 4u][i % 4u]", found: "tiles[0]" } },
    main: (frame) =>
      render("wgsl/gemm.wgsl", {
        ...{ ...frame, bk, words: 2 * half, looped: unrolled < bk, ...arrangement(t.tile) },
        fetches: into(0),
        phases: [
          { n: 0, from: 0, last: false, puts: into(half).flatMap(({ puts }) => puts) },
          { n: 1, from: half, last: true, puts: into(0).flatMap(({ puts }) => puts) },
        ],
        ...registers(t.tile),
      }),
  });
}

/** Where in the tile a thread is: 32 neighbours form 4 rows of 8, so that together they read few different words of either operand. */
function arrangement({ bm, bn, rm, rn }: PlainTile): { readonly ty: string; readonly tx: string } {
  const [down, across] = [bm / rm, bn / rn];
  if (down % 4 || across % 8) return { ty: `l / ${across}u`, tx: `l % ${across}u` };
  return { ty: `l / ${4 * across}u * 4u + l / 8u % 4u`, tx: `l / 32u % ${across / 8}u * 8u + l % 8u` };
}

/** What each thread brings from an operand per step of the depth: runs of four as they lie, put into words of four lanes. */
function fetches(p: WgslProduct, { bm, bn, bk }: PlainTile, letter: OperandName, threads: number, from: number) {
  const lanes = letter === "a" ? bm : bn;
  const base = letter === "a" ? 0 : (bm * bk) / 4;
  const side = { side: letter, first: letter === "a" ? "m0" : "n0" };
  return Array.from({ length: (lanes * bk) / 4 / threads }, (_, j) => {
    const name = `${letter}${j}`;
    const i = `(l + ${j * threads}u)`;
    const word = `${from}u + ${name}_to`;
    if (p[letter].along === "lane")
      return {
        ...{ name, ...side, lane: `${i} % ${lanes / 4}u * 4u`, deep: `${i} / ${lanes / 4}u`, to: `${base}u + ${i}` },
        puts: [{ to: `tiles[${word}]`, value: name }],
      };
    const lane = `${i} / ${bk / 4}u`;
    return {
      ...{ name, ...side, lane, deep: `${i} % ${bk / 4}u * 4u`, to: `${base}u + ${name}_deep * ${lanes / 4}u + ${lane} / 4u` },
      puts: ["x", "y", "z", "w"].map((c, q) => ({ to: `tiles[${word} + ${(q * lanes) / 4}u][${lane} % 4u]`, value: `${name}.${c}` })),
    };
  });
}

/** The sums of one thread, what a step of the depth adds to them, and where they go in the end. */
function registers({ bm, bn, bk, rm, rn, unrolled }: PlainTile) {
  const down = Array.from({ length: rm / 4 }, (_, h) => h);
  const across = Array.from({ length: rn / 4 }, (_, h) => h);
  const all = down.flatMap((h) => ["x", "y", "z", "w"].flatMap((c, i) => across.map((g) => ({ h, c, i, g, sum: `sum${4 * h + i}_${g}` }))));
  const base = (bm * bk) / 4;
  return {
    ...{ sums: all.map(({ sum }) => sum), unrolled, wordsDown: bm / 4, wordsAcross: bn / 4 },
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
