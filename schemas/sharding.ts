/**
 * Blocks of sharded tensors: arithmetic over the mesh of a plan, shared by compiler and runtime. The coordinate of a rank along a
 * sub-axis is floor(number within its stage / stride) % size. A dim that is sharded by sub-axes [f, g] has its blocks numbered with f
 * outermost.
 */

import type { z } from "zod";
import type { Compute, MeshText } from "./plan.ts";
/** The mesh of a plan. */
export type MeshData = z.infer<typeof MeshText>;
type SubAxes = Pick<MeshData, "subAxes">;

/** Returns the number of elements of a shape; 1 for a scalar. */
export function elementsOf(shape: readonly number[]): number {
  let elements = 1;
  for (const size of shape) elements *= size;
  return elements;
}

type Stages = Pick<MeshData, "per_stage" | "stage_stride" | "world">;
/** Returns the pipeline stage of a rank. */
export const stageOfRank = ({ per_stage, stage_stride, world }: Stages, rank: number): number =>
  Math.floor(rank / stage_stride) % (world / per_stage);
/** Returns the number of a rank within its stage; coordinates are computed from it. */
export const numberInStage = ({ per_stage, stage_stride, world }: Stages, rank: number): number =>
  (rank % stage_stride) + Math.floor(rank / ((world / per_stage) * stage_stride)) * stage_stride;
/** Returns the rank with a number within a stage. */
export const rankAt = ({ per_stage, stage_stride, world }: Stages, stage: number, number: number): number =>
  (number % stage_stride) + stage * stage_stride + Math.floor(number / stage_stride) * (world / per_stage) * stage_stride;

/** Returns a sub-axis of the mesh. Throws if the mesh has none of this number. */
export function subAxisOf({ subAxes }: SubAxes, f: number): SubAxes["subAxes"][number] {
  const found = subAxes[f];
  if (!found) throw new Error(`rankc: the mesh has no sub-axis ${f}`);
  return found;
}

/** Returns the coordinate of a rank along a sub-axis. Here and below, `rank` is the number of a rank within its stage. */
export function rankCoordinate(mesh: SubAxes, rank: number, f: number): number {
  const { stride, size } = subAxisOf(mesh, f);
  return Math.floor(rank / stride) % size;
}

/**
 * Returns whether no two sub-axes overlap as factors of the rank number. Sub-axes of grids that do not nest overlap: a tensor that both
 * shard would have blocks that two ranks hold and blocks that no rank holds.
 */
export function isDisjointSubAxes(mesh: SubAxes, fs: readonly number[]): boolean {
  let end = 1;
  return fs
    .map((f) => subAxisOf(mesh, f))
    .sort((a, b) => a.stride - b.stride)
    .every(({ stride, size }, i) => {
      const isApart = i === 0 || stride % end === 0;
      end = stride * size;
      return isApart;
    });
}

/** Returns the number of blocks that sub-axes shard a dim into. */
export function shardCount(mesh: SubAxes, fs: readonly number[]): number {
  let count = 1;
  for (const f of fs) count *= subAxisOf(mesh, f).size;
  return count;
}

/** Returns the first global index of a rank's block of a dim of `size` elements, sharded by `subAxes` (outermost first). */
function startOf(mesh: SubAxes, size: number, subAxes: readonly number[], rank: number, ringOffset: number): number {
  let block = 0;
  for (const f of subAxes) block = block * subAxisOf(mesh, f).size + rankCoordinate(mesh, rank, f);
  const blocks = shardCount(mesh, subAxes);
  return ((block + blocks - (ringOffset % blocks)) % blocks) * (size / blocks);
}

/** Returns the first global index along a dim of the block that an instruction processes on a rank. */
export function globalStart(mesh: SubAxes, { dims, ringOffset }: Pick<Compute, "dims" | "ringOffset">, dim: string, rank: number): number {
  const found = dims[dim];
  if (!found) throw new Error(`rankc: the instruction has no dim ${dim}`);
  const [size, subAxes] = found;
  return startOf(mesh, size, subAxes, rank, ringOffset?.[dim] ?? 0);
}

/** Returns the first element of the block of its input that an instruction reads on a rank; 0 if the input has no blocks. */
export function blockStart(mesh: SubAxes, { blocks = [] }: Pick<Compute, "blocks">, rank: number): number {
  let first = 0;
  for (const { subAxis, stride } of blocks) first += rankCoordinate(mesh, rank, subAxis) * stride;
  return first;
}

/**
 * Returns the global indices that a rank holds of a dim whose blocks are numbered by `blockAxes` and that is sharded by `subAxes`:
 * ascending ranges [start, end), one range if `subAxes` is a prefix of `blockAxes`.
 */
export function dimRanges(
  mesh: SubAxes,
  size: number,
  subAxes: readonly number[],
  blockAxes: readonly number[],
  rank: number,
): [number, number][] {
  const blocks = shardCount(mesh, blockAxes);
  const width = size / blocks;
  const ranges: [number, number][] = [];
  const inner = [...blockAxes].reverse();
  for (let b = 0; b < blocks; b++) {
    let rest = b;
    let mine = true;
    for (const f of inner) {
      const n = subAxisOf(mesh, f).size;
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

/** Returns the group of `rank` along `fs`: the ranks whose other coordinates are equal, as ascending numbers within a stage. */
export function groupMembers(mesh: SubAxes, rank: number, fs: readonly number[]): number[] {
  let base = rank;
  for (const f of fs) base -= rankCoordinate(mesh, rank, f) * subAxisOf(mesh, f).stride;
  let members = [base];
  for (const f of [...fs].sort((a, b) => a - b)) {
    const { stride, size } = subAxisOf(mesh, f);
    members = Array.from({ length: size }, (_, d) => members.map((m) => m + d * stride)).flat();
  }
  return members.sort((a, b) => a - b);
}
