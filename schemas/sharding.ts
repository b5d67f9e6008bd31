/**
 * Where a rank's piece of a tensor lies: arithmetic over the plan's mesh, shared by the compiler and the runtime.
 * A factor is a digit of the rank's number within its stage; a slot cut by factors [f, g] is counted in blocks, f outermost.
 */

import type { z } from "zod";
import type { Compute, Dtype, MeshText } from "./plan.ts";

export type MeshData = z.infer<typeof MeshText>;
type Factors = Pick<MeshData, "factors">;

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
export const digit = ({ factors }: Factors, rank: number, f: number): number => Math.floor(rank / factors[f]!.stride) % factors[f]!.size;

/**
 * Whether factors are digits of one number beside each other, so that no two ranks have the same of all of them but by what else they
 * are. Those of grids that do not nest are not: what both cut would lie twice on some ranks, and on others be missing.
 */
export const areDigits = ({ factors }: Factors, fs: readonly number[]): boolean =>
  [...fs]
    .sort((f, g) => factors[f]!.stride - factors[g]!.stride)
    .every((f, i, all) => i === 0 || factors[f]!.stride % (factors[all[i - 1]!]!.stride * factors[all[i - 1]!]!.size) === 0);

/** In how many parts factors cut. */
export const parts = ({ factors }: Factors, fs: readonly number[]): number => fs.reduce((n, f) => n * factors[f]!.size, 1);

/** The first global index of a rank's contiguous piece of `size` elements, cut by `cut` (outermost first). */
function startOf(mesh: Factors, size: number, cut: readonly number[], rank: number, behind: number): number {
  let block = 0;
  for (const f of cut) block = block * mesh.factors[f]!.size + digit(mesh, rank, f);
  const blocks = parts(mesh, cut);
  return ((block + blocks - (behind % blocks)) % blocks) * (size / blocks);
}

/** The first global index, along a dim, of what an instruction of a rank works on. */
export function startIn(mesh: Factors, { dims, behind }: Pick<Compute, "dims" | "behind">, dim: string, rank: number): number {
  const [size, cut] = dims[dim]!;
  return startOf(mesh, size, cut, rank, behind?.[dim] ?? 0);
}

/**
 * The global indices a rank holds of one slot whose blocks are counted by `radix` and of which the factors `cut` cut it.
 * Ranges [start, end), ascending; one range where `cut` is a prefix of `radix`.
 */
export function rangesOf(mesh: Factors, size: number, cut: readonly number[], radix: readonly number[], rank: number): [number, number][] {
  const blocks = parts(mesh, radix);
  const width = size / blocks;
  const ranges: [number, number][] = [];
  for (let b = 0; b < blocks; b++) {
    let rest = b;
    let mine = true;
    for (let i = radix.length - 1; i >= 0; i--) {
      const f = radix[i]!;
      const n = mesh.factors[f]!.size;
      if (cut.includes(f) && rest % n !== digit(mesh, rank, f)) mine = false;
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
export function membersOf(mesh: Factors, rank: number, fs: readonly number[]): number[] {
  let base = rank;
  for (const f of fs) base -= digit(mesh, rank, f) * mesh.factors[f]!.stride;
  let members = [base];
  for (const f of [...fs].sort((a, b) => a - b)) {
    const { stride, size } = mesh.factors[f]!;
    members = Array.from({ length: size }, (_, d) => members.map((m) => m + d * stride)).flat();
  }
  return members.sort((a, b) => a - b);
}
