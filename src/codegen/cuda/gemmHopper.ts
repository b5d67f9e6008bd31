/**
 * Products of 16-bit floats on Hopper's own tensor-core instructions (sm_90a): chooses tile, stages, cluster and raster, and writes the
 * tensor maps by which boxes of operands are copied. Possible where rows of all operands are multiples of 16 bytes.
 */

import { cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, type Dtype, type Float16, float16Types } from "../../../schemas/dtypes.ts";
import type { TensorMap } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { rowIndex } from "../launchArgs.ts";
import type { MatrixProduct } from "../matmul.ts";
import { mostTiles, sidesOf } from "./matmul.ts";
import { source } from "./text.ts";

/** A device with fewer multiprocessors runs the rest of the blocks later. */
const MULTIPROCESSORS = cudaArchs.sm_90a.multiprocessors;
/** Bytes of shared memory that one block may have. */
const SHARED = cudaArchs.sm_90a.sharedPerBlock * 1024;
/** Of depth, in a stage: one row of the 128-byte swizzle. */
const DEPTH = 64;

/** Rows and columns of c; two warpgroups share it by rows where it has 128, else by columns; or they alternate, each with tiles of its own. */
interface Tile {
  readonly rows: 64 | 128;
  readonly columns: 64 | 128 | 192 | 256;
  readonly alternates?: true;
}
/** Columns of the products of one warpgroup. */
const columnsOf = ({ rows, columns }: Tile): number => (rows === 128 ? columns : columns / 2);
const tiles: readonly Tile[] = [
  { rows: 128, columns: 256 },
  { rows: 128, columns: 192, alternates: true },
  { rows: 128, columns: 128 },
  { rows: 128, columns: 64 },
  { rows: 64, columns: 256 },
  { rows: 64, columns: 128 },
];

export interface HopperTiling {
  readonly tile: Tile;
  readonly cluster: 1 | 2;
  readonly raster: number;
  readonly stages: number;
  /** Of 2 KiB, per warp, through which c leaves. */
  readonly buffers: number;
  readonly blocks: number;
}

/** Of operands of one 16-bit type. Rows must be multiples of 16 bytes for tensor maps; sums onto halves are left to the plain kernel, which rounds them once. */
export const fitsHopper = (p: MatrixProduct): boolean =>
  (p.c.dtype === "f32" || (p.c.dtype === p.a.dtype && !p.adds)) &&
  [sidesOf(p, "a")[0], sidesOf(p, "b")[0]].every((n) => n % 8 === 0) &&
  (p.n * bytesOf[p.c.dtype]) % 16 === 0 &&
  // the offsets of experts stand in shared memory
  p.experts <= 1024;

export function hopper(spec: KernelSpec, p: MatrixProduct, half: Float16, tiling: HopperTiling = hopperTiling(p)): GeneratedKernel {
  const { tile, cluster, stages, buffers, raster, blocks } = tiling;
  const n = columnsOf(tile);
  const count = n / 2;
  const register = (form: (i: number) => string, per: number) =>
    Array.from({ length: count / per }, (_, l) => {
      const line = Array.from({ length: per }, (_, i) => form(l * per + i)).join(", ");
      return l === count / per - 1 ? line : `${line},`;
    });
  const transposed = { transposedA: p.a.depthFirst ? 0 : 1, transposedB: p.b.depthFirst ? 0 : 1 };
  const product = render("cuda/wgmma.cuh", {
    ...{ n, count, ...transposed, ...float16Types[half] },
    ...{ aAt: count, bAt: count + 1, addAt: count + 2 },
    names: register((i) => `%${i}`, 16),
    places: register((i) => `"+f"(sums[${i}])`, 8),
  });
  const ragged = p.ragged !== undefined;
  const body = render("cuda/gemm_wgmma.cu", {
    ...{ name: spec.name, m: p.m, n: p.n, depth: p.depth, experts: p.experts, offsets: p.offsets },
    ...{ raggedRows: flag(p.ragged === "rows"), raggedDepth: flag(p.ragged === "depth"), adds: flag(p.adds) },
    ...{
      depthFirstA: flag(p.a.depthFirst),
      depthFirstB: flag(p.b.depthFirst),
      out: p.c.dtype === "f32" ? "float" : half,
      ...float16Types[half],
    },
    ...{ tileM: tile.rows, tileN: tile.columns, warpgroupsN: 128 / tile.rows, alternates: flag(tile.alternates === true) },
    ...{ stages, buffers, cluster, raster, product, hopper: render("cuda/hopper.cuh", {}) },
    clusterDims: cluster > 1 ? `__cluster_dims__(${cluster}, 1, 1) ` : "",
    parameters: `${p.ragged === "rows" ? ", Out* c" : ""}${ragged ? ", const int* rows" : ""}`,
    ragged,
    pointer: p.ragged === "rows" ? "c" : "nullptr",
  });
  const args = [...mapsOf(p, tiling), ...(p.ragged === "rows" ? [p.c.name] : []), ...(ragged ? [rowIndex] : [])];
  return {
    source: source(spec, body),
    launches: [{ entry: spec.name, grid: [blocks, 1, 1], threads: 384, shared: sharedOf(p, tiling), args }],
  };
}

const flag = (yes: boolean): string => (yes ? "true" : "false");

/** Boxes are 128 bytes wide. Of a: all rows of a tile at once; of b: what one block of the cluster loads; of c: what a warp stores. */
function mapsOf(p: MatrixProduct, { tile, cluster }: HopperTiling): TensorMap[] {
  const [weights, sums] = [p.ragged === "rows" ? p.experts : 1, p.ragged === "depth" ? p.experts : 1];
  const map = (tensor: string, dtype: Dtype, [inner, rows]: readonly [number, number], layers: number, high: number): TensorMap => ({
    ...{ kind: "tensor_map", tensor, dtype, sizes: [inner, rows, layers], swizzle: "128B" },
    strides: [inner * bytesOf[dtype], inner * rows * bytesOf[dtype]],
    box: [128 / bytesOf[dtype], high, 1],
  });
  return [
    map(p.a.name, p.a.dtype, sidesOf(p, "a"), 1, p.a.depthFirst ? tile.rows : DEPTH),
    map(p.b.name, p.b.dtype, sidesOf(p, "b"), weights, p.b.depthFirst ? tile.columns / cluster : DEPTH),
    map(p.c.name, p.c.dtype, [p.n, p.m], sums, 16),
  ];
}

/** Cycles from the last product of a tile to the first of the next, where no other warpgroup multiplies meanwhile. */
const BETWEEN = 1000;

/** The tile that should be fastest: the least cycles, of equal ones the first. */
export function hopperTiling(p: MatrixProduct): HopperTiling {
  const tilings = tiles.map((tile) => {
    const rows = tilesOf(p, tile);
    const columns = Math.ceil(p.n / tile.columns);
    const perExpert = rows * columns;
    const cluster = clusterOf(p, tile, rows, columns);
    const raster = rasterOf(tile, rows);
    const all = perExpert * p.experts;
    const blocks = Math.min(MULTIPROCESSORS, Math.ceil(mostTiles(p, tile.rows, tile.columns) / cluster) * cluster);
    return { tile, cluster, raster, blocks, cycles: cyclesOf(p, tile, cluster, all) };
  });
  const { tile, cluster, raster, blocks } = tilings.reduce((best, other) => (other.cycles < best.cycles ? other : best));
  return { tile, cluster, raster, blocks, ...stagesOf(p, tile) };
}

/** Rows of tiles per expert, were all alike. */
const tilesOf = (p: MatrixProduct, tile: Tile): number => Math.ceil((p.ragged === "rows" ? Math.ceil(p.m / p.experts) : p.m) / tile.rows);

/**
 * Two neighbours in a column of tiles can share b. They walk equal depths together, so both must always have the same one: of
 * ragged depth, an expert's tiles must be even in number. With few rows of tiles pairs seldom lie in one column.
 */
function clusterOf(p: MatrixProduct, tile: Tile, rows: number, columns: number): 1 | 2 {
  if (tile.columns % 128 !== 0 || rows < (p.ragged === "rows" ? 4 : 2)) return 1;
  return p.ragged === "depth" && (rows * columns) % 2 !== 0 ? 1 : 2;
}

/** The band of rows of tiles whose share of a and b, over the blocks at work, is the smallest. Even, so that pairs stay in a column. */
function rasterOf({ rows, columns }: Tile, high: number): number {
  const bytes = (g: number) => Math.min(g, high) * rows + Math.ceil(MULTIPROCESSORS / Math.min(g, high)) * columns;
  return [16, 12, 8, 4].reduce((best, g) => (bytes(g) < bytes(best) ? g : best));
}

/**
 * Cycles of the whole, after DeepGEMM's model: rounds of tiles, each as long as the slowest of multiplying (4096 dense 16-bit
 * operations per cycle and multiprocessor, of which the card's power allows 80 %), of what products read in shared memory (128 bytes
 * per cycle; b once per 64 rows) and of what all blocks together read from L2 (64 bytes per cycle each, at most 6154); and its store,
 * at a multiprocessor's share of the memory's rate (25 bytes per cycle), which only the products of another warpgroup hide. Tiles that
 * load more for each product are slower, by 3 and 6 % (test/results/cuda-products-2026-11-29.md).
 */
function cyclesOf(p: MatrixProduct, tile: Tile, cluster: number, all: number): number {
  const { rows, columns, alternates } = tile;
  const depth = Math.ceil((p.ragged === "depth" ? p.depth / p.experts : p.depth) / DEPTH) * DEPTH;
  const math = ((2 * rows * columns * depth) / (0.8 * 4096)) * (alternates ? 1.03 : rows * columns < 128 * 256 ? 1.06 : 1);
  const memory = (2 * (64 + columnsOf(tile)) * depth * 2) / 128;
  const l2 = ((rows + columns / cluster) * depth * 2) / (Math.min(64 * MULTIPROCESSORS, 6154) / MULTIPROCESSORS);
  const store = (rows * columns * bytesOf[p.c.dtype] * (p.adds ? 2 : 1)) / 25;
  const rounds = Math.ceil(all / MULTIPROCESSORS);
  return alternates ? rounds * Math.max(math, memory, l2, store) + store : rounds * (Math.max(math, memory, l2) + store + BETWEEN);
}

/**
 * f32 sums take as long to leave as many steps take to multiply: they get three stages, and buffers for as much of the tile as
 * then has room, so that most of it drains while the next tile begins. Warpgroups that alternate store under each other's products, so four
 * stages come first. Halves get two buffers and four stages; at most 8 are of use.
 */
function stagesOf(p: MatrixProduct, tile: Tile): Pick<HopperTiling, "stages" | "buffers"> {
  const chunks = (columnsOf(tile) * bytesOf[p.c.dtype]) / 128;
  const [least, wanted] = p.c.dtype === "f32" ? [tile.alternates ? 4 : 3, chunks] : [4, Math.min(2, chunks)];
  for (let buffers = wanted; buffers > 0; buffers--)
    for (let stages = 8; stages >= least; stages--) if (sharedOf(p, { tile, stages, buffers }) <= SHARED) return { stages, buffers };
  invariant(false, `no room for ${least} stages of ${tile.rows} x ${tile.columns}`);
}

/** Bytes: the stages, the buffers of eight warps, two barriers per stage and two of turns, where experts begin and their order. */
const sharedOf = (p: MatrixProduct, { tile, stages, buffers }: Pick<HopperTiling, "tile" | "stages" | "buffers">): number =>
  stages * (tile.rows + tile.columns) * 2 * DEPTH +
  8 * buffers * 2048 +
  16 * stages +
  (tile.alternates ? 16 : 0) +
  (p.ragged ? 4 * (p.experts + 1) : 0) +
  (p.ragged === "depth" ? 4 * p.experts : 0);
