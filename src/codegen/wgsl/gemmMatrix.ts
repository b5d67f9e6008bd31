/**
 * The product on the matrix units that Dawn offers to subgroups, for f16 operands on adapters whose subgroups are 32 wide and multiply
 * 16 x 16 x 16 from f16 into f32. Operands pass through workgroup memory as they lie: a matrix is loaded by rows or by columns.
 */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel } from "../kernelSpec.ts";
import type { Tile, WgslProduct, WgslTiling } from "./product.ts";
import { isWide, type OperandName, productKernel } from "./productText.ts";

export interface MatrixTile extends Tile {
  readonly by: "matrix";
  /** Rows and columns of the output that one subgroup holds. */
  readonly down: number;
  readonly across: number;
}
// efficiencies, of an H200's 67 TFLOP/s without matrix units: the first measured, the second an estimate
export const matrixTiles: readonly MatrixTile[] = [
  { by: "matrix", bm: 128, bn: 128, bk: 32, down: 64, across: 64, efficiency: 3.6 },
  { by: "matrix", bm: 64, bn: 64, bk: 32, down: 32, across: 32, efficiency: 2 },
];
const LANES = 32;
const SIDE = 16;
/** Elements between rows beyond the row: 16 bytes, so that the rows of a matrix begin in different banks. */
const PAD = 8;

export function gemmMatrix(p: WgslProduct, t: WgslTiling<MatrixTile>): GeneratedKernel {
  const { bm, bn, bk, down, across } = t.tile;
  const subgroups = (bm / down) * (bn / across);
  const threads = subgroups * LANES;
  const a = staged(p, t.tile, "a", threads);
  const b = staged(p, t.tile, "b", threads);
  const sums = range(down).flatMap((row, i) =>
    range(across).map((column, j) => ({ sum: `sum${i}_${j}`, a: `a_${i}`, b: `b_${j}`, row, column })),
  );
  return productKernel(p, t, {
    ...{ threads, stage: "f16", wide: true, words: { border: "sums[i]", found: "found_tile" } },
    directives: "enable chromium_experimental_subgroup_matrix;\ndiagnostic(off, chromium.subgroup_matrix_uniformity);\n",
    main: (frame) =>
      render("wgsl/gemm_matrix.wgsl", {
        ...{ ...frame, bk, lanes: LANES, pad: PAD, subgroupsAcross: bn / across, down, across },
        ...{ aSize: a.size, bSize: b.size, sumsSize: subgroups * SIDE * SIDE, grouped: p.by !== "dense" },
        fetches: [...a.fetches, ...b.fetches],
        puts: [...a.puts, ...b.puts],
        steps: range(bk).map((step) => ({ reads: [...a.reads(step), ...b.reads(step)] })),
        products: sums,
      }),
  });
}

const range = (size: number): number[] => Array.from({ length: size / SIDE }, (_, i) => i * SIDE);

/** How an operand lies in workgroup memory, what each thread brings there, and the matrices a subgroup reads in one step of 16. */
function staged(p: WgslProduct, { bm, bn, bk, down, across }: MatrixTile, letter: OperandName, threads: number) {
  const lanes = letter === "a" ? bm : bn;
  const own = letter === "a" ? down : across;
  const deep = p[letter].along === "deep";
  const run = deep ? bk : lanes;
  const stride = run + PAD;
  const first = letter === "a" ? "down_in_tile" : "across_in_tile";
  const brought = isWide(p, p[letter], { wide: true }) ? 8 : 4;
  const fetches = Array.from({ length: (lanes * bk) / brought / threads }, (_, j) => {
    const name = `${letter}${j}`;
    const i = `(l + ${j * threads}u)`;
    const [row, column] = [`${i} / ${run / brought}u`, `${i} % ${run / brought}u * ${brought}u`];
    const to = `${row} * ${stride}u + ${column}`;
    return { name, side: letter, first: letter === "a" ? "m0" : "n0", lane: deep ? row : column, deep: deep ? column : row, to };
  });
  const half = (name: string, i: number): string =>
    brought === 4 ? `${name}.${"xyzw"[i]}` : `bitcast<vec4<f16>>(${name}.${i < 4 ? "xy" : "zw"}).${"xyzw"[i % 4]}`;
  return {
    size: (deep ? lanes : bk) * stride,
    fetches,
    // written element by element, at places whose alignment shows: drivers join what lies side by side
    puts: fetches.flatMap(({ name }) =>
      Array.from({ length: brought }, (_, i) => ({ to: `stage_${letter}[${name}_to + ${i}u]`, value: half(name, i) })),
    ),
    reads: (step: number) =>
      range(own).map((lane, i) => ({
        ...{ name: `${letter}_${i}`, side: letter, hand: letter === "a" ? "left" : "right", stride },
        // rows of the left matrix are lanes, those of the right one steps of the depth
        major: deep === (letter === "a") ? "row_major" : "col_major",
        at: deep ? `(${first} + ${lane}u) * ${stride}u + ${step}u` : `${step * stride}u + ${first} + ${lane}u`,
      })),
  };
}
