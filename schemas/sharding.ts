/**
 * Where a rank's piece of a tensor lies: arithmetic over the plan's mesh, shared by the compiler and the runtime.
 * A factor is a digit of the rank's number within its stage; a slot cut by factors [f, g] is counted in blocks, f outermost.
 */

import type { z } from "zod";
import type { Compute, Dtype, MeshText } from "./plan.ts";

export type MeshData = z.infer<typeof MeshText>;
type Factors = Pick<MeshData, "subAxes">;

export const bytesOf: Readonly<Record<Dtype, number>> = { f32: 4, bf16: 2, f16: 2, i32: 4 };
/** How many elements a shape holds; 1 for a scalar. */
export const elementsOf = (shape: readonly number[]): number => shape.reduce((n, x) => n * x, 1);

type Stages = Pick<MeshData, "per_stage" | "stage_stride" | "world">;
/** The pipeline stage of a rank. */
export const stageOfRank = ({ per_stage, stage_stride, world }: Stages, rank: number): number =>
  Math.floor(rank / stage_stride) % (world / per_stage);
/** A rank's number within its stage: what its digits are read off. */
export const numberInStage = ({ per_stage, stage_stride, world }: Stages, rank: number): number =>
  (rank % stage_stride) + Math.floor(rank / ((world / per_stage) * stage_stride)) * stage_stride;
/** The rank with this number in this stage. */
export const rankAt = ({ per_stage, stage_stride, world }: Stages, stage: number, number: number): number =>
  (number % stage_stride) + stage * stage_stride + Math.floor(number / stage_stride) * (world / per_stage) * stage_stride;

/** This rank's coordinate along one factor; `rank` is its number within its stage, here and below. */
export const rankCoordinate = ({ subAxes }: Factors, rank: number, f: number): number =>
  Math.floor(rank / subAxes[f]!.stride) % subAxes[f]!.size;

/**
 * Whether factors are digits of one number beside each other, so that no two ranks have the same of all of them but by what else they
 * are. Those of grids that do not nest are not: what both cut would lie twice on some ranks, and on others be missing.
 */
export const isDisjointSubAxes = ({ subAxes }: Factors, fs: readonly number[]): boolean =>
  [...fs]
    .sort((f, g) => subAxes[f]!.stride - subAxes[g]!.stride)
    .every((f, i, all) => i === 0 || subAxes[f]!.stride % (subAxes[all[i - 1]!]!.stride * subAxes[all[i - 1]!]!.size) === 0);

/** In how many parts factors cut. */
export const shardCount = ({ subAxes }: Factors, fs: readonly number[]): number => fs.reduce((n, f) => n * subAxes[f]!.size, 1);

/** The first global index of a rank's contiguous piece of `size` elements, cut by `cut` (outermost first). */
function startOf(mesh: Factors, size: number, subAxes: readonly number[], rank: number, ringOffset: number): number {
  let block = 0;
  for (const f of subAxes) block = block * mesh.subAxes[f]!.size + rankCoordinate(mesh, rank, f);
  const blocks = shardCount(mesh, subAxes);
  return ((block + blocks - (ringOffset % blocks)) % blocks) * (size / blocks);
}

/** The first global index, along a dim, of what an instruction of a rank works on. */
export function globalStart(mesh: Factors, { dims, ringOffset }: Pick<Compute, "dims" | "ringOffset">, dim: string, rank: number): number {
  const [size, subAxes] = dims[dim]!;
  return startOf(mesh, size, subAxes, rank, ringOffset?.[dim] ?? 0);
}

/**
 * The global indices a rank holds of one slot whose blocks are counted by `radix` and of which the factors `cut` cut it.
 * Ranges [start, end), ascending; one range where `cut` is a prefix of `radix`.
 */
export function dimRanges(
  mesh: Factors,
  size: number,
  subAxes: readonly number[],
  blockAxes: readonly number[],
  rank: number,
): [number, number][] {
  const blocks = shardCount(mesh, blockAxes);
  const width = size / blocks;
  const ranges: [number, number][] = [];
  for (let b = 0; b < blocks; b++) {
    let rest = b;
    let mine = true;
    for (let i = blockAxes.length - 1; i >= 0; i--) {
      const f = blockAxes[i]!;
      const n = mesh.subAxes[f]!.size;
      if (subAxes.includes(f) && rest % n !== rankCoordinate(mesh, rank, f)) mine = false;
      rest = Math.floor(rest / n);
    }
    if (!mine) continue;
    const last = ranges.at(-1);
    if (last && last[1] === b * width) last[1] += width;
    else ranges.push([b * width, (b + 1) * width]);
  }
  return ranges;
}

/** The ranks (numbers within a stage) that share all digits with `rank` but those of `fs`, ascending. */
export function groupMembers(mesh: Factors, rank: number, fs: readonly number[]): number[] {
  let base = rank;
  for (const f of fs) base -= rankCoordinate(mesh, rank, f) * mesh.subAxes[f]!.stride;
  let members = [base];
  for (const f of [...fs].sort((a, b) => a - b)) {
    const { stride, size } = mesh.subAxes[f]!;
    members = Array.from({ length: size }, (_, d) => members.map((m) => m + d * stride)).flat();
  }
  return members.sort((a, b) => a - b);
}
