/**
 * The input and output of kernel generators. A generator chooses tiles, vector widths and grids in typed code; its template only inserts
 * them. All fields of a kernel spec are constants in the generated source.
 */
import type { OpName } from "../../schemas/opNames.ts";
import type { Dtype } from "../../schemas/plan.ts";
import type { GeneratedLaunch } from "./launchArgs.ts";
import type { Arch, Profile } from "./targetNames.ts";

/** An op with its local sizes, types and attributes: everything a kernel depends on. */
export interface KernelSpec {
  readonly op: OpName;
  /** The unique name of the kernel in the plan, a valid identifier: `rmsnorm_1f3a9c02`. Entry points are named `name` or `name_…`. */
  readonly name: string;
  /** Local sizes of the dims in the signature, and attributes without runtime attributes. `...` has no entries: see `size`. */
  readonly d: Readonly<Record<string, number>>;
  /** Elements of each operand in memory; for ragged operands at the row bound. */
  readonly size: Readonly<Record<string, number>>;
  readonly dtype: Readonly<Record<string, Dtype>>;
  /** Outputs that the kernel adds to or updates in place. */
  readonly accumulates: ReadonlySet<string>;
  /** Largest number of rows of ragged operands; 0 if no operand is ragged. */
  readonly bound: number;
  /** Whether the op writes the index buffer (see `offsetsAt`); otherwise it reads it. */
  readonly makesRows: boolean;
  /** Whether the rows that the op makes may exceed the bound; if so the kernel writes max(needed, rows) to the i32 argument `needed`. */
  readonly mayOverflow: boolean;
}

/** Source and launches of one kernel spec. */
export interface GeneratedKernel {
  readonly source: string;
  readonly launches: readonly GeneratedLaunch[];
  /** Bytes of scratch memory; the launch argument `scratch(n)` is its address n bytes from the start. */
  readonly scratch?: number;
}

export type WgslGenerator = (spec: KernelSpec, profile: Profile) => GeneratedKernel;
export type CudaGenerator = (spec: KernelSpec, arch: Arch) => GeneratedKernel;

/**
 * Returns the index of the row offsets in the index buffer `rows` (i32) of ragged operands. The buffer holds the count of rows; the global
 * (b, s, e) of each row, up to the bound; then, for kernels only, the first row of each local expert and the end of the last one. Rows are
 * sorted by expert; those made by `permute` and `pack` also by b, then s.
 */
export const offsetsAt = (bound: number): number => 1 + 3 * bound;

/** Returns the values of numbered attributes or dims, such as `n0`, `n1`, … of `arrange`. */
export function numbered({ d }: Pick<KernelSpec, "d">, prefix: string): number[] {
  const all: number[] = [];
  while (d[`${prefix}${all.length}`] !== undefined) all.push(d[`${prefix}${all.length}`]!);
  return all;
}

/** Returns the terms by which `split_rows` computes the destination of a row from its coordinates, one per sub-axis. */
export const destinationsOf = (spec: Pick<KernelSpec, "d">) =>
  numbered(spec, "slot").map((slot, i) => ({ slot, div: spec.d[`div${i}`]!, mod: spec.d[`mod${i}`]!, mul: spec.d[`mul${i}`]! }));

/** Returns `positionOf` (src/ops/positions.ts) of an unsigned index as an expression that is valid in WGSL and in CUDA. */
export function positionText(index: string, chunk: number, ranks: number): string {
  if (chunk === 0) return index;
  const rank = `${index} / ${chunk}u / 2u`;
  return `(${rank} + ${index} / ${chunk}u % 2u * (${2 * ranks - 1}u - ${rank} * 2u)) * ${chunk}u + ${index} % ${chunk}u`;
}
