/** Tilings of matrix products: how the output is divided among workgroups. Kernels differ in how they multiply a tile, not in the tiles. */
import { invariant } from "../../ops/op.ts";
import type { MatrixProduct } from "../matmul.ts";

/** The tile of the output of one workgroup, and the steps of the depth between two barriers. */
export interface Tile {
  readonly bm: number;
  readonly bn: number;
  readonly bk: number;
  /** Fraction of the peak of a compute unit that the tile reaches if there are tiles for all units. */
  readonly efficiency: number;
}

/** The tiles of a product: `layers` (experts, or parts of the depth) of `down` by `across` tiles. */
export interface WgslTiling<T extends Tile> {
  readonly tile: T;
  readonly down: number;
  readonly across: number;
  readonly layers: number;
  /** Parts of the depth, whose sums pass through scratch; 1 if the depth is whole. */
  readonly parts: number;
  /** The depth of one part: a multiple of `bk`. */
  readonly slice: number;
}

/** Compute units of a large GPU. */
const UNITS = 128;
/** Multiply-adds of one unit in the time that a second launch takes. */
const LAUNCH = 1e6;
/** The least depth of a part. */
const PART = 512;
/** Row counts pass through f32 words of workgroup memory, which are exact below this number. */
const MOST_ROWS = 2 ** 24;

/** Returns the tiling with the least estimated time on `UNITS` compute units. */
export function tilingOf<T extends Tile>(p: MatrixProduct, tiles: readonly T[]): WgslTiling<T> {
  const { m, depth, ragged } = p;
  invariant(!ragged || (ragged === "rows" ? m : depth) < MOST_ROWS, `a product of experts has at least ${MOST_ROWS} rows`);
  const [first, ...others] = tiles.map((tile) => costOf(p, tile));
  invariant(first !== undefined, "a product has no tiles to choose from");
  return others.reduce((best, next) => (next.cost < best.cost ? next : best), first).tiling;
}

function costOf<T extends Tile>(
  { m, n, depth: k, ragged, experts }: MatrixProduct,
  tile: T,
): { readonly cost: number; readonly tiling: WgslTiling<T> } {
  // the cost assumes experts with equally many rows; the grid has tiles for any distribution
  const down = ragged === "rows" ? experts * Math.ceil(m / experts / tile.bm) : Math.ceil(m / tile.bm);
  const across = Math.ceil(n / tile.bn);
  const count = down * across * (ragged === "depth" ? experts : 1);
  const depth = ragged === "depth" ? Math.ceil(k / experts) : k;
  const wanted = ragged ? 1 : Math.min(Math.floor(UNITS / count), Math.floor(k / PART));
  const slice = Math.ceil(k / Math.max(1, wanted) / tile.bk) * tile.bk;
  const parts = ragged ? 1 : Math.ceil(k / slice);
  const waves = Math.ceil((count * parts) / UNITS);
  const cost = (waves * tile.bm * tile.bn * (depth / parts)) / tile.efficiency + (parts > 1 ? LAUNCH : 0);
  const layers = ragged === "depth" ? experts : parts;
  return { cost, tiling: { tile, down: ragged === "rows" ? Math.ceil(m / tile.bm) + experts : down, across, layers, parts, slice } };
}
