/**
 * The one form of all products with weights: out[m,n] (+)= Σ_k a[m,k]·b[k,n], for one matrix or for the rows of each expert;
 * and how it is cut into tiles. Kernels differ in how they multiply a tile, never in which tiles there are.
 */
import type { Dtype } from "../../../schemas/plan.ts";
import { invariant } from "../../ops/op.ts";
import type { KernelSpec } from "../kernelSpec.ts";

/** An operand: its lanes are rows of a, or columns of b; deep is the dim summed over. */
export interface Side {
  readonly name: string;
  readonly dtype: Dtype;
  /** The dim whose elements lie side by side. */
  readonly along: "lane" | "deep";
  readonly lanes: number;
}

export interface WgslProduct {
  readonly spec: KernelSpec;
  readonly a: Side;
  readonly b: Side;
  readonly out: { readonly name: string; readonly dtype: Dtype; readonly adds: boolean };
  /** Sizes; of what an expert's rows count: their bound over all experts. */
  readonly m: number;
  readonly n: number;
  readonly k: number;
  /** What the rows of an expert are: nothing; rows of the output, each expert having its own b; or the depth, each having its own output. */
  readonly by: "dense" | "rows" | "depth";
  /** 0 where dense. */
  readonly experts: number;
}

export function productOf(spec: KernelSpec): WgslProduct {
  const { B = 0, S = 0, K = 0, N = 0, E = 0 } = spec.d;
  const side = (name: string, along: Side["along"], lanes: number): Side => ({ name, dtype: spec.dtype[name]!, along, lanes });
  const out = (name: string) => ({ name, dtype: spec.dtype[name]!, adds: spec.accumulates.has(name) });
  const grouped = spec.op.startsWith("grouped_");
  // numbers of rows travel through f32 words of workgroup memory
  invariant(!grouped || spec.bound < 2 ** 24, `${spec.op}: ${spec.bound} rows`);
  const rows = grouped ? spec.bound : B * S;
  const experts = grouped ? E : 0;
  switch (spec.op) {
    case "gemm":
    case "grouped_gemm": {
      const by = grouped ? "rows" : "dense";
      return { spec, a: side("x", "deep", rows), b: side("w", "lane", N), out: out("y"), m: rows, n: N, k: K, by, experts };
    }
    case "gemm_dgrad":
    case "grouped_dgrad": {
      const by = grouped ? "rows" : "dense";
      return { spec, a: side("dy", "deep", rows), b: side("w", "deep", K), out: out("dx"), m: rows, n: K, k: N, by, experts };
    }
    default: {
      const by = grouped ? "depth" : "dense";
      return { spec, a: side("x", "lane", K), b: side("dy", "lane", N), out: out("dw"), m: K, n: N, k: rows, by, experts };
    }
  }
}

/** A workgroup's tile of the output, and how far it goes into the depth at once. */
export interface Tile {
  readonly bm: number;
  readonly bn: number;
  readonly bk: number;
  /** The share of a compute unit's multipliers that it keeps busy where there are tiles for all units. */
  readonly efficiency: number;
}

/** The tiles of a product: `layers` (experts, or parts of the depth) of `down` by `across`. */
export interface WgslTiling<T extends Tile> {
  readonly tile: T;
  readonly down: number;
  readonly across: number;
  readonly layers: number;
  /** Parts that the depth is cut into; their sums go through scratch. 1: not cut. */
  readonly parts: number;
  /** The depth of one part: whole steps of `bk`. */
  readonly slice: number;
}

/** Compute units of a large GPU, the multiply-adds one does in the time that a second launch costs, and the least depth worth a part. */
const UNITS = 128;
const LAUNCH = 1e6;
const PART = 512;

/** The tiling that is done first where `UNITS` tiles run at once, each as fast as its shape allows. */
export function tilingOf<T extends Tile>({ m, n, k, by, experts }: WgslProduct, tiles: readonly T[]): WgslTiling<T> {
  let best: { cost: number; tiling: WgslTiling<T> } | undefined;
  for (const tile of tiles) {
    // experts are taken to have equally many rows; the grid has tiles for any distribution
    const down = by === "rows" ? experts * Math.ceil(m / experts / tile.bm) : Math.ceil(m / tile.bm);
    const across = Math.ceil(n / tile.bn);
    const count = down * across * (by === "depth" ? experts : 1);
    const depth = by === "depth" ? Math.ceil(k / experts) : k;
    const wanted = by === "dense" ? Math.min(Math.floor(UNITS / count), Math.floor(k / PART)) : 1;
    const slice = Math.ceil(k / Math.max(1, wanted) / tile.bk) * tile.bk;
    const parts = by === "dense" ? Math.ceil(k / slice) : 1;
    const waves = Math.ceil((count * parts) / UNITS);
    const cost = (waves * tile.bm * tile.bn * (depth / parts)) / tile.efficiency + (parts > 1 ? LAUNCH : 0);
    if (best && best.cost <= cost) continue;
    const layers = by === "depth" ? experts : parts;
    best = { cost, tiling: { tile, down: by === "rows" ? Math.ceil(m / tile.bm) + experts : down, across, layers, parts, slice } };
  }
  return best!.tiling;
}
