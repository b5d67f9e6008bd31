/**
 * Products of f32 operands rounded to TF32 with Hopper's warpgroup products (sm_90a): chooses the tile and the parts of the depth, and writes the
 * tensor maps that copy boxes of operands. The rows of both operands must be multiples of 16 bytes.
 */
import { cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf } from "../../../schemas/dtypes.ts";
import type { TensorMap } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { type GeneratedKernel, type KernelSpec, operandOf } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, rowIndex, scratch, scratchStart } from "../launchArgs.ts";
import type { MatrixProduct } from "../matmul.ts";
import { dividedGrid } from "./dividedGrid.ts";
import { tilesText } from "./gemmTiles.ts";
import { addendsOf, moreOperands, mostTiles, sidesOf } from "./matmul.ts";
import { clearBytes, sumParts } from "./reduce.ts";
import { source } from "./text.ts";
import { leftInRegisters, sumOperands } from "./wgmmaText.ts";

const MULTIPROCESSORS = cudaArchs.sm_90a.multiprocessors;
const SHARED = cudaArchs.sm_90a.sharedPerBlock * 1024;
/** Steps of depth per stage: one row of the 128-byte swizzle. */
const DEPTH = 32;
/** Rows and columns of c. Two warpgroups have half of the rows each. */
interface Tile {
  readonly rows: 128 | 256;
  readonly columns: 128 | 192;
}
const tiles: readonly Tile[] = [
  { rows: 256, columns: 192 },
  { rows: 256, columns: 128 },
  { rows: 128, columns: 128 },
];

/** Tile, shared memory and grid of a product. */
export interface Tf32Tiling {
  readonly tile: Tile;
  readonly stages: number;
  readonly blocks: number;
  /** The last tiles, whose depth is divided among all blocks; 0 if each tile has one block. */
  readonly divided: number;
  /** Whether a launch before rounds b in scratch; else the kernel rounds it for each tile. */
  readonly prepared: boolean;
  /** Parts of the depth, whose sums pass through scratch; 1 if the depth is whole. */
  readonly parts: number;
}

/**
 * Returns whether this kernel computes a product. Tensor maps need rows that are multiples of 16 bytes. Products of less work have more, smaller tiles in
 * another kernel.
 */
export const fitsTf32 = (p: MatrixProduct): boolean =>
  p.tf32 === true &&
  p.c.dtype === "f32" &&
  mostTiles(p, 128, 128) * Math.max(...partsOf(p)) * 2 >= MULTIPROCESSORS &&
  (p.a.depthFirst || !p.b.depthFirst) &&
  (p.addends ?? [p]).every((of) => [sidesOf(of, "a")[0], sidesOf(of, "b")[0]].every((n) => n % 4 === 0));

/**
 * Registers of a thread that loads or rounds, and of one that multiplies; how many fragments of a the latter holds, and how many of the two halves of a
 * box the former transposes in an unrolled loop.
 */
const registersOf = (p: MatrixProduct, { tile, prepared }: Tf32Tiling, divided: number) => {
  if (tile.columns === 128) return { few: 104, many: 200, held: 4, unroll: 2 };
  return prepared && p.a.depthFirst && divided === 0
    ? { few: 24, many: 240, held: 4, unroll: 1 }
    : { few: 40, many: 232, held: 2, unroll: 1 };
};

/** Returns the kernel of a product of f32 operands that are rounded to TF32. */
export function tf32(spec: KernelSpec, p: MatrixProduct, tiling: Tf32Tiling = tf32Tiling(p)): GeneratedKernel {
  const { tile, stages, parts, prepared } = tiling;
  const divided = spec.sharesDevice ? 0 : tiling.divided;
  const inAll = mostTiles(p, tile.rows, tile.columns) * parts;
  const blocks = spec.sharesDevice ? dividedGrid(tiling.blocks, inAll, MULTIPROCESSORS) : tiling.blocks;
  const { addends } = addendsOf(p, DEPTH);
  const ragged = p.ragged !== undefined;
  const body = render("cuda/gemm_tf32.cu", {
    ...{
      name: spec.name,
      ragged,
      offsets: p.offsets,
      stages,
      blocks,
      prepared,
      more: moreOperands(addends),
      ...registersOf(p, tiling, divided),
    },
    ...{ divided: divided > 0, divisions: divided, counters: COUNTER_BYTES },
    tiles: tilesText(
      parts > 1 ? { ...p, adds: false } : p,
      { rows: tile.rows, columns: tile.columns, depth: DEPTH },
      parts > 1 ? partOf(p, parts) : undefined,
    ),
    product: productText(tile.columns),
    hopper: render("cuda/hopper.cuh", {}),
  });
  const sums = divided > 0 ? piecesOf(tile, blocks, divided) : parts > 1 ? parts * p.m * p.n * bytesOf.f32 : 0;
  const rounds = prepared ? roundsOf(spec, p, sums, divided > 0) : [];
  const clears = divided > 0 && !prepared ? [clearBytes(spec, COUNTER_BYTES, scratchStart)] : [];
  const total = parts > 1 ? [sumParts(spec, parts, p.m * p.n, operandOf(spec, p.c.name))] : [];
  const launch: GeneratedLaunch = {
    ...{ entry: spec.name, grid: [blocks, 1, 1], threads: 384, shared: sharedOf(tile, stages) },
    args: [
      ...operandArgs(p, tile, prepared ? scratch(sums) : undefined),
      parts > 1 ? scratchStart : p.c.name,
      ...(ragged ? [rowIndex] : []),
      ...(divided > 0 ? [scratchStart] : []),
    ],
  };
  return {
    source: source(spec, [...clears, ...rounds, { body }, ...total].map((part) => part.body).join("\n")),
    scratch: sums + (prepared ? boxBytes(p) : 0),
    launches: [...[...clears, ...rounds].map((part) => part.launch), launch, ...total.map((part) => part.launch)],
  };
}

/** Bytes of the counters of divided tiles: an i32 each, and fewer tiles than multiprocessors are divided. */
const COUNTER_BYTES = 1024;
/** Bytes of scratch for divided tiles: counters, and the sums of all pieces. */
const piecesOf = ({ rows, columns }: Tile, blocks: number, divided: number): number =>
  COUNTER_BYTES + (blocks + divided) * rows * columns * bytesOf.f32;
/** Bytes of an operand b in boxes of 32 columns and 32 steps of depth. */
const boxBytes = (p: MatrixProduct): number => (p.ragged === "rows" ? p.experts : 1) * stepsOf(p) * Math.ceil(p.n / 32) * 4096;

/** Returns the launches that round operand b, of each addend, into boxes at this place in scratch; the first also clears the counters if there are any. */
function roundsOf(spec: KernelSpec, p: MatrixProduct, at: number, clears: boolean) {
  const experts = p.ragged === "rows" ? p.experts : 1;
  return addendsOf(p, DEPTH).addends.map(({ b, depth, from }, i) => {
    const entry = `${spec.name}_round${i > 0 ? i + 1 : ""}`;
    const counters = clears && i === 0;
    const boxes = experts * Math.ceil(depth / DEPTH) * Math.ceil(p.n / 32);
    const launch: GeneratedLaunch = {
      ...{ entry, grid: [Math.ceil(boxes / 8), 1, 1], threads: 256, shared: 0 },
      args: [b.name, scratch(at), ...(counters ? [scratchStart] : [])],
    };
    const body = render("cuda/round_boxes.cu", {
      ...{ name: entry, n: p.n, depth, first: from / DEPTH, steps: stepsOf(p), experts, counters },
      ...{ depthFirst: b.depthFirst, spreads: !p.a.depthFirst },
    });
    return { body, launch };
  });
}

/** Returns the text of the product of a warpgroup with n columns. */
const productText = (n: number): string =>
  render("cuda/wgmma_tf32.cuh", { n, ...sumOperands(n), left: leftInRegisters(n), bAt: n / 2 + 4, addAt: n / 2 + 5 });

/**
 * Returns the arguments for the operands: tensor maps, whose boxes have all rows of a tile where depth is contiguous, else 32 rows or columns and 32 steps
 * of depth; and where the boxes of b are, if they are prepared.
 */
function operandArgs(p: MatrixProduct, tile: Tile, boxes: KernelArg | undefined): KernelArg[] {
  const map = (of: MatrixProduct, operand: "a" | "b", layers: number): TensorMap => {
    const [inner, rows] = sidesOf(of, operand);
    const high = operand === "a" ? tile.rows : tile.columns;
    return {
      ...{ kind: "tensor_map", tensor: of[operand].name, dtype: "f32", sizes: [inner, rows, layers], swizzle: "128B" },
      ...{ strides: [4 * inner, 4 * inner * rows], box: [32, of[operand].depthFirst ? high : DEPTH, 1] },
    };
  };
  return (p.addends ?? [p]).flatMap((of, i) => [
    map(of, "a", 1),
    ...(boxes === undefined ? [map(of, "b", p.ragged === "rows" ? p.experts : 1)] : i === 0 ? [boxes] : []),
  ]);
}

/** Bytes of shared memory: stages with three barriers each, and a word. */
const sharedOf = ({ rows, columns }: Tile, stages: number): number => stages * ((rows + columns) * 4 * DEPTH + 24) + 16;
const stagesOf = (tile: Tile): number => Math.min(6, Math.floor((SHARED - sharedOf(tile, 0)) / (sharedOf(tile, 1) - sharedOf(tile, 0))));

/** Returns the depth of one part: whole steps. */
const partOf = ({ depth }: MatrixProduct, parts: number): number => Math.ceil(depth / parts / DEPTH) * DEPTH;

/** The least depth of a part, and the most bytes of scratch for sums of parts. */
const [LEAST_PART, MOST_SCRATCH] = [512, 2 ** 26];
/** Returns in how many parts the depth may be cut. */
function partsOf(p: MatrixProduct): readonly number[] {
  if (p.ragged || p.addends || (p.m * p.n) % 4 !== 0) return [1];
  const most = Math.min(16, Math.floor(p.depth / LEAST_PART), Math.floor(MOST_SCRATCH / (p.m * p.n * bytesOf.f32)));
  return Array.from({ length: Math.max(1, most) }, (_, i) => i + 1).filter((n) => Math.ceil(p.depth / partOf(p, n)) === n);
}

/** Cycles of one more launch, of a tile's first loads and last products, and of the sums of pieces. */
const [AGAIN, BETWEEN, PIECES] = [4000, 1500, 120e3];
/** Bytes a cycle of a multiprocessor: its share of the memory's, and of the L2 cache's. */
const [MEMORY, CACHE] = [18, 40];
/** The most bytes of scratch for a rounded b. */
const MOST_PREPARED = 2 ** 28;

/** Returns the tiling with the fewest estimated cycles; of equal ones the first. */
export function tf32Tiling(p: MatrixProduct): Tf32Tiling {
  const tilings = tiles.flatMap((tile) =>
    [...partsOf(p).map((parts) => ({ tile, parts, divided: 0 })), ...dividedOf(p, tile)].flatMap((t) =>
      (p.ragged !== "depth" && boxBytes(p) <= MOST_PREPARED ? [false, true] : [false]).map((prepared) => ({ ...t, prepared })),
    ),
  );
  const cycles = (t: (typeof tilings)[number]): number => cyclesOf(p, t);
  const { tile, parts, divided, prepared } = tilings.reduce((best, other) => (cycles(other) < cycles(best) ? other : best));
  const blocks = Math.min(MULTIPROCESSORS, divided > 0 ? MULTIPROCESSORS : mostTiles(p, tile.rows, tile.columns) * parts);
  return { tile, stages: stagesOf(tile), blocks, parts, divided, prepared };
}

/** Returns the tiling that divides the tiles of the last round among all blocks, if a tile then has few pieces of enough steps. */
function dividedOf(p: MatrixProduct, tile: Tile): { tile: Tile; parts: 1; divided: number }[] {
  const divided = mostTiles(p, tile.rows, tile.columns) % MULTIPROCESSORS;
  const isFew = divided * 4 >= MULTIPROCESSORS && divided * stepsOf(p) >= 8 * MULTIPROCESSORS;
  return !p.ragged && isFew ? [{ tile, parts: 1, divided }] : [];
}
const stepsOf = (p: MatrixProduct): number => Math.ceil(addendsOf(p, DEPTH).depth / DEPTH);

/** Cycles of a step of depth on an H200 (test/results/cuda-products-2026-12-01.md): b prepared, rounded, also transposed, and a in another order too. */
const stepCycles = ({ rows, columns }: Tile): readonly [number, number, number, number] =>
  rows === 128 ? [730, 1090, 1250, 1310] : columns === 128 ? [1330, 1710, 1730, 1810] : [1680, 2100, 2210, 2350];

/** Returns the estimated cycles of a product: rounds of tiles, and what is read and written beside them. */
function cyclesOf(p: MatrixProduct, { tile, parts, divided, prepared }: Omit<Tf32Tiling, "stages" | "blocks">): number {
  const { rows, columns } = tile;
  const steps = p.ragged === "depth" ? p.depth / p.experts / DEPTH : parts > 1 ? partOf(p, parts) / DEPTH : stepsOf(p);
  const step = stepCycles(tile)[prepared ? 0 : p.b.depthFirst ? 1 : p.a.depthFirst ? 2 : 3];
  const size = rows * columns * bytesOf.f32;
  const each = steps * step + (size * (p.adds || parts > 1 ? 2 : 1)) / MEMORY + BETWEEN;
  const high = Math.ceil((p.ragged === "rows" ? Math.ceil(p.m / p.experts) : p.m) / rows) * (p.ragged ? p.experts : 1);
  const rounds = (high * Math.ceil(p.n / columns) * parts) / MULTIPROCESSORS;
  const before = prepared ? AGAIN + (2 * boxBytes(p)) / MEMORY / MULTIPROCESSORS : divided > 0 ? AGAIN : 0;
  // a block has two pieces more than tiles, and the last block of a tile reads the sums of all its pieces
  if (divided > 0) return before + rounds * each + PIECES + 2 * BETWEEN + ((2 + MULTIPROCESSORS / divided) * size) / CACHE;
  const after = parts > 1 ? AGAIN + ((parts + 1) * p.m * p.n * bytesOf.f32) / MEMORY / MULTIPROCESSORS : 0;
  return before + Math.ceil(rounds) * each + after;
}
