/**
 * Products of f32 operands whose depth is contiguous. Their kernel reads shared memory with depth as the outer dim, and copies that change the order move
 * single floats. So a large product transposes such operands in scratch, in launches before it: each copy then moves four floats.
 */
import type { Arch } from "../../../schemas/devices.ts";
import { bytesOf } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { type GeneratedLaunch, scratch } from "../launchArgs.ts";
import type { Matrix, MatrixProduct } from "../matmul.ts";
import { ENOUGH, simt } from "./gemmTiles.ts";
import { mostTiles, sidesOf } from "./matmul.ts";
import { source } from "./text.ts";

/** Share of the time of a product that copies of four floats save, of either operand (test/results/cuda-products-2026-12-01.md). */
const SAVED = { a: 0.035, b: 0.025 } as const;
/** Operations and bytes a second of an H200, seconds of a short launch, and the most bytes of a transposed operand. */
const [FLOPS, BYTES, LAUNCH, MOST] = [48e12, 3.5e12, 3e-6, 2 ** 28];

/** Returns the number of matrices of an operand. */
const layersOf = (p: MatrixProduct, operand: "a" | "b"): number => (operand === "b" && p.ragged === "rows" ? p.experts : 1);

/** Returns whether the transposition of an operand, of all addends, takes less time than it saves. */
function isTransposed(p: MatrixProduct, operand: "a" | "b"): boolean {
  const all = p.addends ?? [p];
  const hasContiguousDepth = all.map((of) => of[operand]).every(({ dtype, depthFirst }) => dtype === "f32" && depthFirst);
  // ragged rows begin at any row
  if (!hasContiguousDepth || p.tf32 || mostTiles(p, 128, 128) < ENOUGH || p.a.dtype !== p.b.dtype || (operand === "a" && p.ragged))
    return false;
  const elements = all.map((of) => layersOf(p, operand) * sidesOf(of, operand).reduce((x, y) => x * y, 1));
  const bytes = elements.reduce((sum, n) => sum + n, 0) * bytesOf.f32;
  const fits = bytes <= MOST && all.every((of) => sidesOf(of, operand).every((n) => n % 4 === 0));
  return fits && (SAVED[operand] * 2 * p.m * p.n * p.depth) / FLOPS > (2 * bytes) / BYTES + all.length * LAUNCH;
}

/** Returns the kernel of a product after launches that transpose `operands` in scratch; by default those whose transposition saves time. */
export function transposedFirst(
  spec: KernelSpec,
  p: MatrixProduct,
  arch: Arch,
  operands: readonly ("a" | "b")[] = (["a", "b"] as const).filter((operand) => isTransposed(p, operand)),
): GeneratedKernel {
  if (operands.length === 0) return simt(spec, p, { arch });
  const transposed = <P extends MatrixProduct>(of: P): P => {
    const other = (operand: "a" | "b"): Matrix => ({ ...of[operand], depthFirst: !operands.includes(operand) && of[operand].depthFirst });
    return { ...of, a: other("a"), b: other("b") };
  };
  const product = simt(spec, { ...transposed(p), ...(p.addends && { addends: p.addends.map(transposed) }) }, { arch, edge: 128 });
  let end = product.scratch ?? 0;
  const transpositions = (p.addends ?? [p]).flatMap((of) =>
    operands.map((operand) => {
      const at = Math.ceil(end / 256) * 256;
      const [columns, rows] = sidesOf(of, operand);
      const layers = layersOf(p, operand);
      end = at + layers * rows * columns * bytesOf.f32;
      const { name } = of[operand];
      const entry = `${spec.name}_turn_${name}`;
      const grid = Math.ceil(rows / 64) * Math.ceil(columns / 64) * layers;
      const launch: GeneratedLaunch = { entry, grid: [grid, 1, 1], threads: 256, shared: 0, args: [name, scratch(at)] };
      return { name, at, launch, body: render("cuda/turn.cu", { name: entry, rows, columns, layers }) };
    }),
  );
  const placed = new Map(transpositions.map(({ name, at }) => [name, scratch(at)]));
  const withScratch = (launch: GeneratedLaunch): GeneratedLaunch => ({
    ...launch,
    args: launch.args.map((arg) => (typeof arg === "string" ? (placed.get(arg) ?? arg) : arg)),
  });
  return {
    source: `${source(spec, transpositions.map(({ body }) => body).join("\n"))}\n${product.source}`,
    scratch: end,
    launches: [...transpositions.map(({ launch }) => launch), ...product.launches.map(withScratch)],
  };
}
