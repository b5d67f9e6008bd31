/**
 * Products of 16-bit floats with Hopper's warpgroup products (sm_90a): chooses tile, stages, cluster and raster, and writes the tensor maps that copy
 * boxes of operands. The rows of all operands must be multiples of 16 bytes.
 */

import { cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, type Dtype, type Float16, float16Types } from "../../../schemas/dtypes.ts";
import type { TensorMap } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import { type GeneratedKernel, type KernelSpec, operandOf } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, rowIndex, scratch, scratchStart } from "../launchArgs.ts";
import type { Epilogue, MatrixProduct } from "../matmul.ts";
import { dividedGrid } from "./dividedGrid.ts";
import { type EpilogueText, elementsOf, epilogueText, sumsOfRows } from "./epilogue.ts";
import { addendsOf, moreOperands, mostTiles, sidesOf } from "./matmul.ts";
import { clearBytes, sumParts } from "./reduce.ts";
import { source } from "./text.ts";
import { sumOperands } from "./wgmmaText.ts";

/** The grid is sized for this number; a device with fewer multiprocessors runs the remaining thread blocks later. */
const MULTIPROCESSORS = cudaArchs.sm_90a.multiprocessors;
/** Shared memory of a thread block in bytes. */
const SHARED = cudaArchs.sm_90a.sharedPerBlock * 1024;
/** Steps of depth per stage: one row of the 128-byte swizzle. */
const DEPTH = 64;

/** Rows and columns of c. Two warpgroups split a tile by rows if it has 128, otherwise by columns; if `alternates`, each takes whole tiles in turn. */
interface Tile {
  readonly rows: 64 | 128;
  readonly columns: 64 | 128 | 192 | 256;
  readonly alternates?: true;
}
/** Returns the columns of the products of one warpgroup. */
const columnsOf = ({ rows, columns }: Tile): number => (rows === 128 ? columns : columns / 2);
/** The tiles of products with an epilogue, which takes as long as many products: the other warpgroup multiplies meanwhile. */
const epilogueTiles: readonly Tile[] = [
  { rows: 128, columns: 192, alternates: true },
  { rows: 128, columns: 128, alternates: true },
];
const tiles: readonly Tile[] = [
  { rows: 128, columns: 256 },
  { rows: 128, columns: 192, alternates: true },
  { rows: 128, columns: 128 },
  { rows: 128, columns: 64 },
  { rows: 64, columns: 256 },
  { rows: 64, columns: 128 },
];

/** Tile, cluster, order and shared memory of a product. */
export interface HopperTiling {
  readonly tile: Tile;
  readonly cluster: 1 | 2;
  readonly raster: number;
  readonly stages: number;
  /** Staging buffers for c per warp, 2 KiB each. */
  readonly buffers: number;
  /** Of a product with an epilogue, the sets of buffers for its operands and results per warp; then `buffers` are those of all sets. */
  readonly sets?: number;
  readonly blocks: number;
  /** Parts of the depth, whose sums pass through scratch; 1 if the depth is whole. */
  readonly parts: number;
}

/**
 * Returns whether this kernel computes a product with operands of one 16-bit type. Tensor maps need rows that are multiples of 16 bytes. A product that
 * is added to a 16-bit c uses another kernel, which rounds once.
 */
export const fitsHopper = (p: MatrixProduct): boolean =>
  (p.c.dtype === p.a.dtype || (p.c.dtype === "f32" && !p.epilogue)) &&
  (p.addends ?? [p]).every((of) => [sidesOf(of, "a")[0], sidesOf(of, "b")[0]].every((n) => n % 8 === 0)) &&
  (p.n * bytesOf[p.c.dtype]) % 16 === 0 &&
  // the offsets of experts are kept in shared memory
  p.experts <= 1024;

/** Returns the kernel of a product with operands of type `half`. */
export function hopper(spec: KernelSpec, p: MatrixProduct, half: Float16, tiling: HopperTiling = hopperTiling(p)): GeneratedKernel {
  const { tile, cluster, stages, buffers, raster, parts, sets = 0 } = tiling;
  const tilesInAll = mostTiles(sumsOf(p, parts), tile.rows, tile.columns) * parts;
  const blocks = spec.sharesDevice ? dividedGrid(tiling.blocks, tilesInAll, MULTIPROCESSORS) : tiling.blocks;
  const epilogue = p.epilogue && epilogueText(spec, p, p.epilogue);
  const splits = parts > 1;
  const n = columnsOf(tile);
  const lastColumns = lastColumnsOf(p, tile);
  const product = productText(p, half, "product", n, n);
  const lastProduct = lastColumns < tile.columns ? productText(p, half, "lastProduct", lastColumns, n) : "";
  const ragged = p.ragged !== undefined;
  const tickets = !spec.sharesDevice && takesTickets(p, tiling);
  // what is stored without a tensor map, and 16-bit sums that are read before
  const target = splits ? scratchStart : !epilogue && (p.ragged === "rows" || (p.adds && p.c.dtype !== "f32")) ? p.c.name : undefined;
  const sumBytes = p.m * p.n * bytesOf.f32 * parts;
  const second = p.twin && (splits ? scratch(sumBytes) : p.twin.c.name);
  const stored = epilogue ? { ...epilogue, target: `Operands{${epilogue.operands.join(", ")}}` } : resultsOf(target, second);
  const { addends, depth } = addendsOf(p, DEPTH);
  const body = render("cuda/gemm_wgmma.cu", {
    ...{ name: spec.name, m: p.m, n: p.n, depth, experts: splits ? parts : p.experts, offsets: p.offsets },
    part: splits ? partOf(p, parts) : depth,
    more: moreOperands(addends),
    ...{ raggedRows: flag(p.ragged === "rows"), raggedDepth: flag(p.ragged === "depth"), adds: flag(p.adds && !splits) },
    ...{
      depthFirstA: flag(p.a.depthFirst),
      depthFirstB: flag(p.b.depthFirst),
      out: p.c.dtype === "f32" || splits ? "float" : half,
      ...float16Types[half],
    },
    ...{ tileM: tile.rows, tileN: tile.columns, warpgroupsN: 128 / tile.rows, alternates: flag(tile.alternates === true) },
    ...{ stages, buffers, cluster, raster, product, lastColumns, lastProduct, hopper: render("cuda/hopper.cuh", {}) },
    clusterDims: cluster > 1 ? `__cluster_dims__(${cluster}, 1, 1) ` : "",
    ...{ sets, epilogue: epilogue?.body ?? "", twin: p.twin !== undefined, maps: stored.maps },
    parameters: [...stored.pointers, ...(ragged ? ["const int* rows"] : []), ...(tickets ? ["u64* tickets"] : [])]
      .map((parameter) => `, ${parameter}`)
      .join(""),
    ...{ tickets: flag(tickets), ticketsPointer: tickets ? "tickets" : "nullptr" },
    ragged,
    target: stored.target,
  });
  const args = [...mapsOf(p, tiling, epilogue), ...stored.args, ...(ragged ? [rowIndex] : []), ...(tickets ? [scratchStart] : [])];
  const launch = { entry: spec.name, grid: [blocks, 1, 1], threads: 384, shared: sharedOf(sumsOf(p, parts), tiling), args } as const;
  if (tickets) {
    const start = clearBytes(spec, TICKET_BYTES, scratchStart);
    return {
      source: source(spec, `${start.body}\n${body}`),
      scratch: TICKET_BYTES,
      launches: [start.launch, { ...launch, grid: [...launch.grid] }],
    };
  }
  const plain = { ...launch, grid: [...launch.grid] } satisfies GeneratedLaunch;
  const rowSums = epilogue && sumsOfRows(spec, epilogue, p.m, Math.ceil(p.n / tile.columns));
  if (rowSums) return { source: source(spec, `${body}\n${rowSums.body}`), scratch: rowSums.scratch, launches: [plain, rowSums.launch] };
  if (!splits) return { source: source(spec, body), launches: [plain] };
  const totals = [p.c, ...(p.twin ? [p.twin.c] : [])].map(({ name }, nth) =>
    sumParts(spec, parts, p.m * p.n, operandOf(spec, name), nth * sumBytes),
  );
  return {
    source: source(spec, [body, ...totals.map((total) => total.body)].join("\n")),
    scratch: totals.length * sumBytes,
    launches: [plain, ...totals.map((total) => total.launch)],
  };
}

/** Returns the text of the product of 64 rows and `n` columns, with the sums of `columns`. */
function productText(p: MatrixProduct, half: Float16, name: string, n: number, columns: number): string {
  const transposed = { transposedA: p.a.depthFirst ? 0 : 1, transposedB: p.b.depthFirst ? 0 : 1 };
  return render("cuda/wgmma.cuh", {
    ...{ name, n, size: columns / 2, ...sumOperands(n, 16), ...transposed, ...float16Types[half] },
    ...{ aAt: n / 2, bAt: n / 2 + 1, addAt: n / 2 + 2 },
  });
}

/** Returns the columns of the products of the last tiles of a row: those that c has, rounded up to boxes. A tile that warpgroups divide by columns has all. */
const lastColumnsOf = ({ n }: MatrixProduct, { rows, columns }: Tile): number =>
  rows === 128 ? Math.ceil((((n - 1) % columns) + 1) / 64) * 64 : columns;

/** The counters of the tiles that thread blocks have taken from both ends of their list. */
const TICKET_BYTES = 8;
/** Returns whether thread blocks take tiles when they are free: those of experts with unequal depths, which no neighbour in a cluster shares. */
const takesTickets = (p: MatrixProduct, { tile, cluster }: Pick<HopperTiling, "tile" | "cluster">): boolean =>
  p.ragged === "depth" && tile.alternates === true && cluster === 1;
/** Numbers of tiles with two barriers each. */
const SLOT_BYTES = 4 * (16 + 4);

/** Returns the depth of one part: whole steps. */
const partOf = ({ depth }: MatrixProduct, parts: number): number => Math.ceil(depth / parts / DEPTH) * DEPTH;
/** Returns the product whose sums a tile stores: in f32 for each part. */
const sumsOf = (p: MatrixProduct, parts: number): MatrixProduct =>
  parts > 1 ? { ...p, depth: partOf(p, parts), adds: false, c: { ...p.c, dtype: "f32" } } : p;

/** Returns the parameters and arguments for c, and that of a twin: tensor maps, and a pointer each if `target` and `second` are the arguments for those. */
function resultsOf(
  target: KernelArg | undefined,
  second: KernelArg | undefined,
): Pick<EpilogueText, "maps" | "pointers" | "args"> & { readonly target: string } {
  const [maps, pointers] = second
    ? [
        ["firstMap", "twinMap"],
        ["firstC", "twinC"],
      ]
    : [["map"], ["c"]];
  const isStored = target !== undefined;
  return {
    maps: maps.map((name) => `const __grid_constant__ TensorMap ${name}`).join(", "),
    pointers: isStored ? pointers.map((name) => `Out* ${name}`) : [],
    args: isStored ? [target, ...(second ? [second] : [])] : [],
    target: [...maps, ...pointers.map((name) => (isStored ? name : "nullptr"))].join(", "),
  };
}

const flag = (yes: boolean): string => (yes ? "true" : "false");

/**
 * Returns the tensor maps. Boxes are 128 bytes wide; a: all rows of a tile; b: the share of one thread block of the cluster; c, or the operands
 * and results of an epilogue: the rows that a warp stores.
 */
function mapsOf(p: MatrixProduct, { tile, cluster }: HopperTiling, epilogue?: EpilogueText): TensorMap[] {
  const [weights, sums] = [p.ragged === "rows" ? p.experts : 1, p.ragged === "depth" ? p.experts : 1];
  const map = (tensor: string, dtype: Dtype, [inner, rows]: readonly [number, number], layers: number, high: number): TensorMap => ({
    ...{ kind: "tensor_map", tensor, dtype, sizes: [inner, rows, layers], swizzle: "128B" },
    strides: [inner * bytesOf[dtype], inner * rows * bytesOf[dtype]],
    box: [128 / bytesOf[dtype], high, 1],
  });
  const operands = (of: MatrixProduct): TensorMap[] => [
    map(of.a.name, of.a.dtype, sidesOf(of, "a"), 1, of.a.depthFirst && p.ragged !== "rows" ? tile.rows : DEPTH),
    map(of.b.name, of.b.dtype, sidesOf(of, "b"), weights, of.b.depthFirst ? tile.columns / cluster : DEPTH),
  ];
  const stored = epilogue ? [...epilogue.inputs, ...epilogue.results] : [p.c.name, ...(p.twin ? [p.twin.c.name] : [])];
  const second = p.twin ? operands({ ...p, ...p.twin }).slice(1) : [];
  return [...(p.addends ?? [p]).flatMap(operands), ...second, ...stored.map((name) => map(name, p.c.dtype, [p.n, p.m], sums, 16))];
}

/** Cycles between the last product of a tile and the first of the next, if no other warpgroup multiplies in between. */
const BETWEEN = 1000;

/** Returns the tiling with the fewest estimated cycles; of equal ones the first. */
export function hopperTiling(p: MatrixProduct): HopperTiling {
  const { cycles: _, own, ...tiling } = fastest(p);
  return { ...tiling, ...(p.epilogue ? setsOf(own, tiling.tile, p.epilogue) : stagesOf(own, tiling.tile)) };
}
/** Returns whether one launch computes both products of a pair in fewer cycles than two launches. */
export const joinsTwin = ({ twin, ...p }: MatrixProduct): boolean =>
  twin?.n === p.n && fastest({ ...p, twin }).cycles <= 2 * fastest(p).cycles + AGAIN;

/** Returns the choices of a tiling, its cycles, and the product whose sums it stores. */
function fastest(p: MatrixProduct) {
  const tilings = splitsOf(p).flatMap((parts) =>
    (p.epilogue ? epilogueTiles : tiles).map((tile) => {
      const own = sumsOf(p, parts);
      const rows = tilesOf(own, tile);
      const columns = Math.ceil(p.n / tile.columns);
      const perExpert = rows * columns;
      const cluster = parts > 1 ? 1 : clusterOf(own, tile, rows, columns);
      const raster = rasterOf(tile, rows);
      const all = perExpert * p.experts * parts * (p.twin ? 2 : 1);
      const most = mostTiles(own, tile.rows, tile.columns) * parts;
      const blocks = Math.min(MULTIPROCESSORS, Math.ceil(most / cluster) * cluster);
      const sums = AGAIN + ((parts + 1) * p.m * p.n * 4) / 25 / MULTIPROCESSORS;
      const cycles = cyclesOf(own, tile, cluster, all) + (parts > 1 ? sums * (p.twin ? 2 : 1) : 0);
      return { tile, cluster, raster, blocks, parts, cycles, own };
    }),
  );
  return tilings.reduce((best, other) => (other.cycles < best.cycles ? other : best));
}

/** Cycles of a second launch. */
const AGAIN = 5000;
/** The least depth of a part. */
const LEAST_PART = 1024;
/** Returns in how many parts the depth may be cut: that of a dense weight gradient with fewer tiles than multiprocessors. */
const splitsOf = (p: MatrixProduct): readonly number[] =>
  p.ragged ||
  p.addends ||
  p.epilogue ||
  p.a.depthFirst ||
  p.b.depthFirst ||
  mostTiles(p, 128, 64) > MULTIPROCESSORS ||
  (p.m * p.n) % 4 !== 0
    ? [1]
    : [1, 2, 3, 4, 5, 6, 7, 8].filter(
        (parts) => parts === 1 || (p.depth / parts >= LEAST_PART && Math.ceil(p.depth / partOf(p, parts)) === parts),
      );

/** Returns the rows of tiles per expert if all experts are equal. */
const tilesOf = (p: MatrixProduct, tile: Tile): number => Math.ceil((p.ragged === "rows" ? Math.ceil(p.m / p.experts) : p.m) / tile.rows);

/**
 * Returns the cluster size. Two adjacent tiles in a column share b. They proceed along the depth together, so both must have equal depths: with ragged
 * depth, each expert needs an even number of tiles. With few rows of tiles, adjacent tiles are rarely in one column.
 */
function clusterOf(p: MatrixProduct, tile: Tile, rows: number, columns: number): 1 | 2 {
  if (p.epilogue || (p.twin && p.ragged) || tile.columns % 128 !== 0 || rows < (p.ragged === "rows" ? 4 : 2)) return 1;
  return p.ragged === "depth" && (rows * columns) % 2 !== 0 ? 1 : 2;
}

/** Returns the height of a band, in rows of tiles, for which concurrent thread blocks read the fewest bytes of a and b. Even, so that pairs stay in a column. */
function rasterOf({ rows, columns }: Tile, high: number): number {
  const bytes = (g: number) => Math.min(g, high) * rows + Math.ceil(MULTIPROCESSORS / Math.min(g, high)) * columns;
  return [16, 12, 8, 4].reduce((best, g) => (bytes(g) < bytes(best) ? g : best));
}

/**
 * Returns the estimated cycles of a product, after DeepGEMM's model: rounds of tiles, where the slowest of three decides. Products: 4096 dense 16-bit
 * operations per cycle and multiprocessor, of which the power limit allows 80 %. Reads of shared memory: 128 bytes per cycle; b once per 64 rows.
 * Reads from L2: 64 bytes per cycle and multiprocessor, at most 6154 in total. The store adds the multiprocessor's share of the memory bandwidth (25
 * bytes per cycle) unless it overlaps with products of another warpgroup. Tiles with more loads per product are 3 and 6 % slower
 * (test/results/cuda-products-2026-11-29.md).
 */
function cyclesOf(p: MatrixProduct, tile: Tile, cluster: number, all: number): number {
  const { rows, columns, alternates } = tile;
  const depth = Math.ceil((p.ragged === "depth" ? p.depth / p.experts : p.depth) / DEPTH) * DEPTH;
  const math = ((2 * rows * columns * depth) / (0.8 * 4096)) * (alternates ? 1.03 : rows * columns < 128 * 256 ? 1.06 : 1);
  const memory = (2 * (64 + columnsOf(tile)) * depth * 2) / 128;
  const l2 = ((rows + columns / cluster) * depth * 2) / (Math.min(64 * MULTIPROCESSORS, 6154) / MULTIPROCESSORS);
  const moved = p.epilogue ? movedBy(p, p.epilogue) : p.adds ? 2 : 1;
  const store = (rows * columns * bytesOf[p.c.dtype] * moved) / 25;
  const rounds = Math.ceil(all / MULTIPROCESSORS);
  return alternates ? rounds * Math.max(math, memory, l2, store) + store : rounds * (Math.max(math, memory, l2) + store + BETWEEN);
}

/**
 * Returns stages and staging buffers. Storing f32 sums takes as long as many steps of products: they get at least three stages and as many buffers as
 * then fit, so that most of the store overlaps with the next tile. With alternating warpgroups the store already overlaps, so at least four
 * stages come first. 16-bit sums get two buffers and at least four stages; more than 8 stages give no gain.
 */
function stagesOf(p: MatrixProduct, tile: Tile): Pick<HopperTiling, "stages" | "buffers"> {
  const chunks = (columnsOf(tile) * bytesOf[p.c.dtype]) / 128;
  const [least, wanted] = p.c.dtype === "f32" ? [tile.alternates ? 4 : 3, chunks] : [4, Math.min(2, chunks)];
  for (let buffers = wanted; buffers > 0; buffers--)
    for (let stages = 8; stages >= least; stages--) if (sharedOf(p, { tile, stages, buffers }) <= SHARED) return { stages, buffers };
  invariant(false, `no room for ${least} stages of ${tile.rows} x ${tile.columns}`);
}

/** Returns stages and buffers of a product with an epilogue: at least four stages, then up to two sets of buffers, so that one is loaded while another is used. */
function setsOf(p: MatrixProduct, tile: Tile, epilogue: Epilogue): Pick<HopperTiling, "stages" | "buffers" | "sets"> {
  const { inputs, results } = elementsOf(p, epilogue);
  const perSet = Math.max(inputs.length, results.length);
  for (const sets of [2, 1])
    for (let stages = 6; stages >= 4; stages--)
      if (sharedOf(p, { tile, stages, buffers: sets * perSet, sets }) <= SHARED) return { stages, buffers: sets * perSet, sets };
  invariant(false, `no room for the operands of ${epilogue.formula.name}`);
}
/** Returns how many tensors of the size of c an epilogue reads and stores. */
function movedBy(p: MatrixProduct, epilogue: Epilogue): number {
  const { inputs, results } = elementsOf(p, epilogue);
  return inputs.length + results.length;
}

/** Returns the shared memory in bytes: stages, buffers of eight warps, two barriers per stage, two barriers of turns, numbers of tiles, offsets and order of experts. */
const sharedOf = (
  p: MatrixProduct,
  { tile, stages, buffers, sets = 0 }: Pick<HopperTiling, "tile" | "stages" | "buffers" | "sets">,
): number =>
  stages * (tile.rows + tile.columns) * 2 * DEPTH +
  8 * buffers * 2048 +
  16 * stages +
  (tile.alternates ? 16 : 0) +
  (p.ragged === "depth" && tile.alternates ? SLOT_BYTES : 0) +
  8 * sets * 8 +
  (p.ragged ? 4 * (p.experts + 1) : 0) +
  (p.ragged === "depth" ? 4 * p.experts : 0);
