/** Products with one thread block per tile of c, on all architectures: 16-bit floats on tensor cores since sm_80, and f32 arithmetic. */

import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType, type Float16, float16Types } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { type GeneratedKernel, type KernelSpec, operandOf } from "../kernelSpec.ts";
import { rowIndex, scratchStart } from "../launchArgs.ts";
import type { MatrixProduct } from "../matmul.ts";
import { addendsOf, moreOperands, mostTiles, sidesOf } from "./matmul.ts";
import { sumColumns, sumParts } from "./reduce.ts";
import { source } from "./text.ts";

/** Edges of square tiles of c. */
type Edge = 128 | 64 | 32;
/** The number of tiles that gives about every multiprocessor one. */
export const ENOUGH = 100;
/** Of depth, that f32 arithmetic multiplies between two barriers. */
const STEP = 16;
/** Seconds of a short launch. */
const LAUNCH_SECONDS = 4e-6;
const MULTIPROCESSORS = cudaArchs.sm_90a.multiprocessors;

const flag = (yes: boolean): string => (yes ? "true" : "false");

const edgeOf = <E extends Edge>(p: MatrixProduct, edges: readonly E[]): E =>
  edges.find((e) => mostTiles(p, e, e) >= ENOUGH) ?? edges.at(-1)!;

/** Returns the constants of a product in tiles of a size, with `depth` the step of depth, and the functions that find tiles and store them. */
export function tilesText(
  p: MatrixProduct,
  tile: { readonly rows: number; readonly columns: number; readonly depth: number },
  part?: number,
): string {
  const { addends, depth } = addendsOf(p, tile.depth);
  return render("cuda/gemm_tiles.cuh", {
    ...{
      m: p.m,
      n: p.n,
      depth,
      part: part ?? depth,
      experts: p.experts,
      ownDepth: addends[0]?.depth ?? depth,
      adds: flag(p.adds),
      out: cudaType(p.c.dtype),
    },
    ...{ raggedRows: flag(p.ragged === "rows"), raggedDepth: flag(p.ragged === "depth") },
    ...{ depthFirstA: flag(p.a.depthFirst), depthFirstB: flag(p.b.depthFirst) },
    ...{ tileM: tile.rows, tileN: tile.columns, tileK: tile.depth, raster: 8 },
  });
}

const square = (edge: Edge, depth: number) => ({ rows: edge, columns: edge, depth });

function launched(
  spec: KernelSpec,
  p: MatrixProduct,
  edge: Edge,
  launch: { readonly threads: number; readonly shared: number },
  body: string,
): GeneratedKernel {
  const args = [...operandsOf(p), p.c.name, ...(p.ragged ? [rowIndex] : [])];
  return { source: source(spec, body), launches: [{ entry: spec.name, grid: [mostTiles(p, edge, edge), 1, 1], ...launch, args }] };
}

/** The names of all operands, in the order of a kernel's parameters. */
const operandsOf = (p: MatrixProduct): string[] => (p.addends ?? [p]).flatMap(({ a, b }) => [a.name, b.name]);
/** Returns whether rows of an operand, in all addends, are multiples of so many elements. */
const areMultiples = (p: MatrixProduct, operand: "a" | "b", n: number): boolean =>
  (p.addends ?? [p]).every((of) => sidesOf(of, operand)[0] % n === 0);

/** Returns the kernel of a product whose operands have the 16-bit type `half`. */
export function mma(spec: KernelSpec, p: MatrixProduct, half: Float16, edge: 128 | 64 = edgeOf(p, [128, 64])): GeneratedKernel {
  const [stages, tileK] = [4, 32];
  const warps = edge === 128 ? { warpsM: 2, warpsN: 4 } : { warpsM: 2, warpsN: 2 };
  const aligned = (operand: "a" | "b") => flag(areMultiples(p, operand, 8));
  const body = render("cuda/gemm_mma.cu", {
    ...{ name: spec.name, ragged: p.ragged !== undefined, offsets: p.offsets, stages, ...warps, ...float16Types[half] },
    ...{
      alignedA: aligned("a"),
      alignedB: aligned("b"),
      tiles: tilesText(p, square(edge, tileK)),
      more: moreOperands(addendsOf(p, tileK).addends),
    },
  });
  return launched(spec, p, edge, { threads: 32 * warps.warpsM * warps.warpsN, shared: stages * 2 * edge * tileK * 2 }, body);
}

const isPipelined = ({ a, b }: MatrixProduct): boolean => a.dtype === "f32" && b.dtype === "f32";

/** Operations and bytes a second of an H200, by which the number of parts is chosen. */
const RATE = { f32: 46e12, tf32: 200e12, bytes: 4e12 } as const;
/** The most bytes of scratch for sums of parts. */
const MOST_SCRATCH = 2 ** 26;
/**
 * Returns the depth that one thread block of f32 arithmetic sums. If c has too few tiles for the multiprocessors (router weights), or its last tiles
 * would leave many of them idle, the depth is split into parts of at least 512.
 */
function partOf(p: MatrixProduct): number {
  const tiles = mostTiles(p, 128, 128);
  if (p.ragged || p.addends) return p.depth;
  const partsOf = (count: number): number => Math.ceil(p.depth / count / STEP) * STEP;
  if (!isPipelined(p)) {
    if (mostTiles(p, 64, 64) >= ENOUGH) return p.depth;
    return partsOf(Math.max(1, Math.min(32, Math.round(MULTIPROCESSORS / tiles), Math.floor(p.depth / 512))));
  }
  const bytes = p.m * p.n * bytesOf.f32;
  const seconds = (parts: number): number => {
    const slots = 2 * MULTIPROCESSORS;
    const flops = (Math.ceil((tiles * parts) / slots) * slots * 2 * 128 * 128 * p.depth) / parts;
    return flops / (p.tf32 ? RATE.tf32 : RATE.f32) + (parts > 1 ? (2 * parts * bytes) / RATE.bytes + LAUNCH_SECONDS : 0);
  };
  const most = Math.min(32, Math.floor(p.depth / 512), Math.floor(MOST_SCRATCH / bytes));
  const counts = Array.from({ length: Math.max(1, most) }, (_, i) => i + 1);
  return partsOf(counts.reduce((best, count) => (seconds(count) < 0.95 * seconds(best) ? count : best)));
}

/** How a product is divided. */
interface BlockOptions {
  readonly edge: Edge;
  readonly arch: Arch;
  /** The depth of a thread block, if it is below that of the product. */
  readonly part?: number;
}
/** Options of `simt`. Default: edge and part are chosen by the sizes; sm_90a. */
type SimtOptions = Partial<BlockOptions>;
interface Block {
  readonly body: string;
  readonly threads: number;
  readonly shared: number;
}
/** Returns a kernel that reads operands of any float types through registers. */
function fetched(spec: KernelSpec, p: MatrixProduct, { edge, part }: BlockOptions): Block {
  const each = edge === 128 ? 8 : 4;
  const vector = (operand: "a" | "b") => (areMultiples(p, operand, 4) ? 4 : 1);
  const body = render("cuda/gemm_f32.cu", {
    ...{
      name: spec.name,
      ragged: p.ragged !== undefined,
      offsets: p.offsets,
      perThread: each,
      a: cudaType(p.a.dtype),
      b: cudaType(p.b.dtype),
    },
    ...{ vectorA: vector("a"), vectorB: vector("b"), tiles: tilesText(p, square(edge, STEP), part), tf32: p.tf32 === true },
    more: moreOperands(addendsOf(p, STEP).addends),
  });
  return { body, threads: (edge / each) ** 2, shared: 0 };
}

/** Returns a kernel for f32 operands in tiles of 128 x 128 with asynchronous copies. Operands rounded to TF32 are multiplied by tensor cores. */
function pipelined(spec: KernelSpec, p: MatrixProduct, { edge, part, arch }: BlockOptions): Block {
  const tf32 = p.tf32 === true;
  // two operands that change their order fill a longer step too slowly
  const step = !tf32 && p.a.depthFirst && p.b.depthFirst ? 8 : 16;
  const pitch = edge + (tf32 ? 8 : 4);
  // sums of fused multiply-adds read shared memory with depth as the outer dim; tensor cores read both orders
  const isInner = (operand: "a" | "b") => p[operand].depthFirst && tf32;
  const keepsOrder = (operand: "a" | "b") => tf32 || !p[operand].depthFirst;
  const unit = (operand: "a" | "b") => (keepsOrder(operand) && areMultiples(p, operand, 4) ? 4 : 1);
  const floatsOf = (operand: "a" | "b") => (isInner(operand) ? edge * (step + 4) : step * pitch);
  const stageBytes = (floatsOf("a") + floatsOf("b")) * bytesOf.f32;
  // a multiprocessor has two blocks; of each it takes 1 KB
  const stages = Math.min(step === 8 ? 4 : 3, Math.floor(((cudaArchs[arch].sharedPerMultiprocessor / 2 - 1) * 1024) / stageBytes));
  const body = render("cuda/gemm_f32_pipelined.cu", {
    ...{ name: spec.name, ragged: p.ragged !== undefined, offsets: p.offsets, stages, pitch, tf32 },
    ...{ unitA: unit("a"), unitB: unit("b"), tiles: tilesText(p, square(edge, step), part) },
    more: moreOperands(addendsOf(p, step).addends),
  });
  return { body, threads: 128, shared: stages * stageBytes };
}

/** Returns the kernel of a product with operands of any float types. If `part` is below the depth, sums go to scratch and a second launch adds them in order. */
export function simt(spec: KernelSpec, p: MatrixProduct, options: SimtOptions = {}): GeneratedKernel {
  const { part = partOf(p), arch = "sm_90a" } = options;
  const edge = options.edge ?? (part < p.depth ? 128 : edgeOf(p, [128, 64, 32]));
  const parts = Math.max(1, Math.ceil(p.depth / part));
  const sums = parts > 1 ? { ...p, adds: false, c: { ...p.c, dtype: "f32" as const } } : p;
  const { body, threads, shared } = (edge === 128 && isPipelined(p) ? pipelined : fetched)(spec, sums, {
    ...{ edge, arch },
    ...(parts > 1 && { part }),
  });
  if (parts === 1) return launched(spec, p, edge, { threads, shared }, body);
  const to = operandOf(spec, p.c.name);
  const size = p.m * p.n;
  const total = size % 4 === 0 ? sumParts(spec, parts, size, to) : sumColumns(spec, { rows: parts, width: size, to });
  const grid = [mostTiles(p, edge, edge) * parts, 1, 1] as const;
  return {
    source: source(spec, `${body}\n${total.body}`),
    scratch: parts * p.m * p.n * bytesOf.f32,
    launches: [{ entry: spec.name, grid: [...grid], threads, shared, args: [p.a.name, p.b.name, scratchStart] }, total.launch],
  };
}
