/**
 * What a kernel's maker is told of one use of an op, and what it answers. A maker decides tiles, vector widths and grids, in
 * typed code; its template only fills them in. Everything it is told is a constant of the generated source.
 */
import type { Dtype, Launch } from "../../schemas/plan.ts";
import type { Arch, Profile } from "./targetNames.ts";

export interface KernelSpec {
  readonly op: string;
  /** A name no other kernel of the plan has, fit for a function: `rmsnorm_1f3a9c02`. Entries are it, or begin with it and `_`. */
  readonly name: string;
  /** Local sizes of the signature's dims, and attributes but those that are told at launch. Of `...` operands none: see `size`. */
  readonly d: Readonly<Record<string, number>>;
  /** Elements of each operand in memory; of ragged ones at their bound. */
  readonly size: Readonly<Record<string, number>>;
  readonly dtype: Readonly<Record<string, Dtype>>;
  /** Outputs that are added to (or updated in place) rather than made anew. */
  readonly accumulates: ReadonlySet<string>;
  /** Rows that ragged operands hold at most; 0 where none is ragged. */
  readonly bound: number;
  /** The op makes the index buffer (see below) rather than reading it. */
  readonly makesRows: boolean;
  /** It makes rows, and their bound may be exceeded: then it writes how many it needed, if more than is there, into the i32 argument `needed`. */
  readonly mayOverflow: boolean;
}

export interface GeneratedKernel {
  readonly source: string;
  readonly launches: readonly Launch[];
  /** Bytes; `scratch+N` in a launch's arguments points into them. */
  readonly scratch?: number;
}

export type WgslGenerator = (spec: KernelSpec, profile: Profile) => GeneratedKernel;
export type CudaGenerator = (spec: KernelSpec, arch: Arch) => GeneratedKernel;

/**
 * The index buffer `rows` of ragged operands, i32: the count of rows; (b, s, e) of each, global, up to the bound; then, for
 * kernels alone, where each local expert's rows begin, and the end of the last. Rows stand sorted by expert; those made
 * by `permute` and `pack` also by b, then s.
 */
export const offsetsAt = (bound: number): number => 1 + 3 * bound;

/** The values of numbered attributes or dims: `n0`, `n1`, … of `arrange`. */
export function numbered({ d }: Pick<KernelSpec, "d">, prefix: string): number[] {
  const all: number[] = [];
  while (d[`${prefix}${all.length}`] !== undefined) all.push(d[`${prefix}${all.length}`]!);
  return all;
}

/** How `split_rows` tells a row's destination from its coordinates: one term for each factor. */
export const destinationsOf = (spec: Pick<KernelSpec, "d">) =>
  numbered(spec, "slot").map((slot, i) => ({ slot, div: spec.d[`div${i}`]!, mod: spec.d[`mod${i}`]!, mul: spec.d[`mul${i}`]! }));

/** `positionOf` (src/ops/positions.ts) of an unsigned index, as an expression of WGSL and of CUDA alike. */
export function positionText(index: string, chunk: number, ranks: number): string {
  if (chunk === 0) return index;
  const rank = `${index} / ${chunk}u / 2u`;
  return `(${rank} + ${index} / ${chunk}u % 2u * (${2 * ranks - 1}u - ${rank} * 2u)) * ${chunk}u + ${index} % ${chunk}u`;
}
