/**
 * Products in f32 arithmetic: each thread holds 4 x 4 or 8 x 8 sums in registers and reads both operands from tiles in workgroup memory.
 * Bounds are checked only for sizes that the tile does not divide.
 */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import type { MatrixProduct } from "../matmul.ts";
import type { Tile, WgslTiling } from "./matmul.ts";
import { type ProductSide, productKernel } from "./matmulText.ts";

/** A tile in f32 arithmetic. */
export interface PlainTile extends Tile {
  readonly by: "plain";
  /** Rows and columns of the output per thread: runs of 4, spaced evenly over the tile. */
  readonly rm: number;
  readonly rn: number;
  /** Unrolled steps of the depth. Few steps give short sources, which software adapters compile fast. */
  readonly unrolled: number;
}
// efficiencies relative to the 67 TFLOP/s of an H200: 0.68 and 0.63 are measured; the others are estimates whose order is measured
/** The tiles in f32 arithmetic. */
export const plainTiles: readonly PlainTile[] = [
  { by: "plain", bm: 128, bn: 128, bk: 8, rm: 8, rn: 8, unrolled: 8, efficiency: 0.68 },
  { by: "plain", bm: 64, bn: 64, bk: 8, rm: 8, rn: 8, unrolled: 8, efficiency: 0.63 },
  { by: "plain", bm: 32, bn: 32, bk: 8, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
  { by: "plain", bm: 64, bn: 16, bk: 16, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
  { by: "plain", bm: 16, bn: 64, bk: 16, rm: 4, rn: 4, unrolled: 2, efficiency: 0.25 },
];

/** Returns the kernel of a product in f32 arithmetic. */
export function gemmTiles(spec: KernelSpec, p: MatrixProduct, t: WgslTiling<PlainTile>): GeneratedKernel {
  const { bm, bn, bk, rm, rn, unrolled } = t.tile;
  const threads = (bm / rm) * (bn / rn);
  const half = ((bm + bn) * bk) / 4;
  const into = (from: number) => [...fetches(p, t.tile, "a", threads, from), ...fetches(p, t.tile, "b", threads, from)];
  return productKernel(spec, p, t, {
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

/** Returns the coordinates of a thread in the tile. 32 neighbours form 4 rows of 8, so that together they read few different words. */
function arrangement({ bm, bn, rm, rn }: PlainTile): { readonly ty: string; readonly tx: string } {
  const [down, across] = [bm / rm, bn / rn];
  if (down % 4 || across % 8) return { ty: `l / ${across}u`, tx: `l % ${across}u` };
  return { ty: `l / ${4 * across}u * 4u + l / 8u % 4u`, tx: `l / 32u % ${across / 8}u * 8u + l % 8u` };
}

/** Returns the loads of each thread per step of the depth: runs of four in memory order, stored in words of four lanes. */
function fetches(p: MatrixProduct, { bm, bn, bk }: PlainTile, letter: ProductSide, threads: number, from: number) {
  const lanes = letter === "a" ? bm : bn;
  const base = letter === "a" ? 0 : (bm * bk) / 4;
  const side = { side: letter, first: letter === "a" ? "m0" : "n0" };
  return Array.from({ length: (lanes * bk) / 4 / threads }, (_, j) => {
    const name = `${letter}${j}`;
    const i = `(l + ${j * threads}u)`;
    const word = `${from}u + ${name}_to`;
    if (!p[letter].depthFirst)
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

/** Returns the sums of one thread, their updates per step of the depth, and their positions in the output. */
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
