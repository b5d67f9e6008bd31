/**
 * Products on the subgroup matrix units of Dawn, for f16 operands on adapters with subgroups of 32 that multiply 16 x 16 x 16 from f16 into
 * f32. Workgroup memory keeps the order of an operand in memory: matrices are loaded by rows or by columns.
 */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import type { MatrixProduct } from "../matmul.ts";
import type { Tile, WgslTiling } from "./matmul.ts";
import { isWide, type ProductSide, productKernel } from "./matmulText.ts";

/** A tile of subgroup matrices. */
export interface MatrixTile extends Tile {
  readonly by: "matrix";
  /** Rows and columns of the output per subgroup. */
  readonly down: number;
  readonly across: number;
}
// efficiencies relative to the 67 TFLOP/s of an H200 without matrix units: the first is measured, the second an estimate
/** The tiles of subgroup matrices. */
export const matrixTiles: readonly MatrixTile[] = [
  { by: "matrix", bm: 128, bn: 128, bk: 32, down: 64, across: 64, efficiency: 3.6 },
  { by: "matrix", bm: 64, bn: 64, bk: 32, down: 32, across: 32, efficiency: 2 },
];
const LANES = 32;
const SIDE = 16;
/** Padding of a row in elements: 16 bytes, so that the rows of a matrix begin in different banks. */
const PAD = 8;

/** Returns the kernel of a product on subgroup matrices. */
export function gemmMatrix(spec: KernelSpec, p: MatrixProduct, t: WgslTiling<MatrixTile>): GeneratedKernel {
  const { bm, bn, bk, down, across } = t.tile;
  const subgroups = (bm / down) * (bn / across);
  const threads = subgroups * LANES;
  const a = staged(p, t.tile, "a", threads);
  const b = staged(p, t.tile, "b", threads);
  const sums = range(down).flatMap((row, i) =>
    range(across).map((column, j) => ({ sum: `sum${i}_${j}`, a: `a_${i}`, b: `b_${j}`, row, column })),
  );
  return productKernel(spec, p, t, {
    ...{ threads, stage: "f16", wide: true, words: { border: "sums[i]", found: "found_tile" } },
    directives: "enable chromium_experimental_subgroup_matrix;\ndiagnostic(off, chromium.subgroup_matrix_uniformity);\n",
    main: (frame) =>
      render("wgsl/gemm_matrix.wgsl", {
        ...{ ...frame, bk, lanes: LANES, pad: PAD, subgroupsAcross: bn / across, down, across },
        ...{ aSize: a.size, bSize: b.size, sumsSize: subgroups * SIDE * SIDE, grouped: p.ragged !== undefined },
        fetches: [...a.fetches, ...b.fetches],
        puts: [...a.puts, ...b.puts],
        steps: range(bk).map((step) => ({ reads: [...a.reads(step), ...b.reads(step)] })),
        products: sums,
      }),
  });
}

const range = (size: number): number[] => Array.from({ length: size / SIDE }, (_, i) => i * SIDE);

/** Returns the size of an operand in workgroup memory, the loads of each thread, and the matrices that a subgroup reads in one step of 16. */
function staged(p: MatrixProduct, { bm, bn, bk, down, across }: MatrixTile, letter: ProductSide, threads: number) {
  const lanes = letter === "a" ? bm : bn;
  const own = letter === "a" ? down : across;
  const deep = p[letter].depthFirst;
  const run = deep ? bk : lanes;
  const stride = run + PAD;
  const first = letter === "a" ? "down_in_tile" : "across_in_tile";
  const perLoad = isWide(p, letter, { wide: true }) ? 8 : 4;
  const fetches = Array.from({ length: (lanes * bk) / perLoad / threads }, (_, j) => {
    const name = `${letter}${j}`;
    const i = `(l + ${j * threads}u)`;
    const [row, column] = [`${i} / ${run / perLoad}u`, `${i} % ${run / perLoad}u * ${perLoad}u`];
    const to = `${row} * ${stride}u + ${column}`;
    return { name, side: letter, first: letter === "a" ? "m0" : "n0", lane: deep ? row : column, deep: deep ? column : row, to };
  });
  const half = (name: string, i: number): string =>
    perLoad === 4 ? `${name}.${"xyzw"[i]}` : `bitcast<vec4<f16>>(${name}.${i < 4 ? "xy" : "zw"}).${"xyzw"[i % 4]}`;
  return {
    size: (deep ? lanes : bk) * stride,
    fetches,
    // stores of single elements at addresses of known alignment: drivers combine adjacent ones
    puts: fetches.flatMap(({ name }) =>
      Array.from({ length: perLoad }, (_, i) => ({ to: `stage_${letter}[${name}_to + ${i}u]`, value: half(name, i) })),
    ),
    reads: (step: number) =>
      range(own).map((lane, i) => ({
        ...{ name: `${letter}_${i}`, side: letter, hand: letter === "a" ? "left" : "right", stride },
        // the rows of the left matrix are lanes, those of the right matrix steps of the depth
        major: deep === (letter === "a") ? "row_major" : "col_major",
        at: deep ? `(${first} + ${lane}u) * ${stride}u + ${step}u` : `${step * stride}u + ${first} + ${lane}u`,
      })),
  };
}
