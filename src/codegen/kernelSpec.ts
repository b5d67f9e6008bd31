/**
 * The input and output of kernel generators. A generator chooses tiles, vector widths and grids in typed code; its template only inserts
 * them. All fields of a kernel spec are constants in the generated source.
 */

import type { Arch } from "../../schemas/devices.ts";
import type { Dtype } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import { listedName } from "../../schemas/tensorLists.ts";
import { type AnyOp, type Attrs, invariant, type OperandName, type SizeName } from "../ops/op.ts";
import type { GeneratedLaunch } from "./launchArgs.ts";
import type { Profile } from "./targetNames.ts";

/**
 * An op with its local sizes, types and attributes: everything a kernel depends on. `Operand` are the names of the op's operands, `Size`
 * those of its dims and required attributes.
 */
export interface KernelSpec<Operand extends string = string, Size extends string = string> {
  readonly op: OpName;
  /** The unique name of the kernel in the plan, a valid identifier: `rmsnorm_1f3a9c02`. Entry points are named `name` or `name_…`. */
  readonly name: string;
  /** Local sizes of the dims in the signature, and attributes without runtime attributes. `...` has no entries: see `size`. */
  readonly d: Readonly<Record<Size, number>> & Attrs;
  /** Elements of each operand in memory; for ragged operands at the row bound. */
  readonly size: Readonly<Record<Operand, number>>;
  readonly dtype: Readonly<Record<Operand, Dtype>>;
  /** Outputs that the kernel adds to or updates in place. */
  readonly accumulates: ReadonlySet<string>;
  /** Largest number of rows of ragged operands; 0 if no operand is ragged. */
  readonly bound: number;
  /** Strides of the blocks of the input, of which a rank reads its own, in elements; absent if it reads the whole input. */
  readonly blocks?: readonly number[];
  /** Whether the op writes the index buffer (see `offsetsAt`); otherwise it reads it. */
  readonly makesRows: boolean;
  /** The number of tensors of a list (schemas/tensorLists.ts); then `size` has the operands of each, and `dtype` those of the first. */
  readonly tensors?: number;
  /** Whether the rows that the op makes may exceed the bound; if so the kernel writes max(needed, rows) to the i32 argument `needed`. */
  readonly mayOverflow: boolean;
  /** Whether collectives run at the same time, which occupy multiprocessors: see `dividedGrid`. */
  readonly sharesDevice?: true;
}
/** The kernel spec of one op of the table. */
export type SpecOf<O> = KernelSpec<OperandName<O>, SizeName<O>>;

/** An operand of a kernel. */
export interface KernelOperand {
  readonly name: string;
  readonly dtype: Dtype;
  /** Elements in memory. */
  readonly size: number;
}
/** Returns an operand of a kernel. Throws a BrokenInvariant if the op has no operand of that name. */
export function operandOf<Operand extends string>({ op, dtype, size }: KernelSpec<Operand>, name: Operand): KernelOperand {
  const [type, elements] = [dtype[name], size[name]];
  invariant(type !== undefined && elements !== undefined, `a kernel of ${op} has no operand ${name}`);
  return { name, dtype: type, size: elements };
}

/** Returns an operand of each tensor of a list. Throws a BrokenInvariant if a tensor lacks it. */
export function listOf({ op, size, dtype, tensors = 1 }: KernelSpec, name: string): KernelOperand[] {
  return Array.from({ length: tensors }, (_, n) => {
    const [type, elements] = [dtype[name], size[listedName(name, n)]];
    invariant(type !== undefined && elements !== undefined, `a kernel of ${op} has no operand ${name} of tensor ${n}`);
    return { name, dtype: type, size: elements };
  });
}

/**
 * Returns the spec of an op of lists (src/ops/dispatch.ts) as that of the op of dense tokens that it is like: each place of the list is a
 * token. Throws a BrokenInvariant unless the rank has one group of experts.
 */
export function listAsTokens<Operand extends string, Size extends string>(
  spec: KernelSpec<Operand | "c", Size | "E" | "K">,
): KernelSpec<Operand | "c", Size | "B" | "S" | "E"> {
  const { E, K }: Readonly<Record<"E" | "K", number>> = spec.d;
  invariant(E === K, () => `${spec.op}: a rank has ${E} experts, and a row the weights of ${K}`);
  return { ...spec, d: { ...spec.d, B: operandOf<Operand | "c">(spec, "c").size / K, S: 1 } };
}

/** Returns the spec of an op that gathers the W values of groups of a list as that of the op that gathers the K values of groups of tokens. */
export function groupsOfList<Operand extends string, Size extends string>(
  spec: KernelSpec<Operand | "c", Size | "E" | "K" | "W">,
): KernelSpec<Operand | "c", Size | "B" | "S" | "E" | "K"> {
  const tokens = listAsTokens<Operand, Size | "W">(spec);
  const { W }: Readonly<Record<"W", number>> = spec.d;
  return { ...tokens, d: { ...tokens.d, K: W } };
}

/** Source and launches of one kernel spec. */
export interface GeneratedKernel {
  readonly source: string;
  readonly launches: readonly GeneratedLaunch[];
  /** Bytes of scratch memory; the launch argument `scratch(n)` is its address n bytes from the start. */
  readonly scratch?: number;
}

/** Generates the WGSL kernel of the op `Name` for a profile. */
export interface WgslGenerator<Name extends OpName = OpName> {
  (spec: KernelSpec, profile: Profile): GeneratedKernel;
  readonly op: Name;
}
/** Generates the CUDA kernel of the op `Name` for an architecture. */
export interface CudaGenerator<Name extends OpName = OpName> {
  (spec: KernelSpec, arch: Arch): GeneratedKernel;
  readonly op: Name;
}
/** A table with the kernel of each of these ops: an op without a kernel, or with the kernel of another op, does not compile. */
export type WgslKernels<Name extends OpName> = { readonly [N in Name]: WgslGenerator<N> };
/** CUDA generators of some ops. */
export type CudaKernels<Name extends OpName> = { readonly [N in Name]: CudaGenerator<N> };

/** Makes a function of any spec from a function of the typed spec of one op. */
export const forOp =
  <O extends AnyOp, Rest extends readonly unknown[], T>(op: O, of: (spec: SpecOf<O>, ...rest: Rest) => T) =>
  (spec: KernelSpec, ...rest: Rest): T =>
    of(specOf(op, spec), ...rest);

/** Makes the CUDA generator of an op. */
export const cudaKernel = <O extends AnyOp>(op: O, generate: (spec: SpecOf<O>, arch: Arch) => GeneratedKernel): CudaGenerator<O["name"]> =>
  Object.assign(forOp(op, generate), { op: op.name });

/** Makes the WGSL generator of an op. */
export const wgslKernel = <O extends AnyOp>(
  op: O,
  generate: (spec: SpecOf<O>, profile: Profile) => GeneratedKernel,
): WgslGenerator<O["name"]> => Object.assign(forOp(op, generate), { op: op.name });

/** Returns a spec with the names of its op. Throws a BrokenInvariant if an operand, a dim or a required attribute is missing. */
function specOf<O extends AnyOp>(op: O, spec: KernelSpec): SpecOf<O> {
  invariant(hasNames(op, spec), `the kernel of ${op.name} has the spec of ${spec.op}`);
  return spec;
}
function hasNames<O extends AnyOp>({ name, inputs, outputs, attrs = [] }: O, spec: KernelSpec): spec is SpecOf<O> {
  const operands = [...inputs, ...outputs].filter((o) => !OPTIONAL.includes(o.name));
  for (const o of operands) invariant(o.name in spec.size && o.name in spec.dtype, `the spec of ${name} has no operand ${o.name}`);
  const sizes = [...operands.flatMap((o) => (o.any ? [] : o.dimSpecs).flatMap((s) => [s.dim, ...s.inner])), ...attrs];
  for (const s of sizes) invariant(s in spec.d, `the spec of ${name} has no size or attribute ${s}`);
  return spec.op === name;
}
/** Outputs that a use of an op need not have: `needed` counts rows where their number may exceed the bound. */
const OPTIONAL: readonly string[] = ["needed"];

/**
 * Returns the index of the row offsets in the index buffer `rows` (i32) of ragged operands. The buffer holds the count of rows; the global
 * (b, s, e) of each row, up to the bound; then, for kernels only, the first row of each local expert and the end of the last one. Rows are
 * sorted by expert; those made by `permute` and `pack` also by b, then s.
 */
export const offsetsAt = (bound: number): number => 1 + 3 * bound;

/** Returns the values of numbered attributes, such as `n0`, `n1`, … of `arrange`. */
export function numbered({ d }: Pick<KernelSpec, "d">, prefix: string): number[] {
  const all: number[] = [];
  for (let value = d[`${prefix}0`]; value !== undefined; value = d[`${prefix}${all.length}`]) all.push(value);
  return all;
}

/** One term of the destination of a row, coordinate[slot] / div % mod · mul: the rank's coordinate along one sub-axis. */
export interface DestinationTerm {
  readonly slot: number;
  readonly div: number;
  readonly mod: number;
  readonly mul: number;
}
/** Returns the terms by which `split_rows` computes the destination of a row from its coordinates. */
export function destinationsOf(spec: Pick<KernelSpec, "d">): DestinationTerm[] {
  const [div, mod, mul] = [numbered(spec, "div"), numbered(spec, "mod"), numbered(spec, "mul")];
  return numbered(spec, "slot").map((slot, i) => ({ slot, div: div[i] ?? 1, mod: mod[i] ?? 1, mul: mul[i] ?? 1 }));
}

/** Returns `positionOf` (src/ops/positions.ts) of an unsigned index as an expression that is valid in WGSL and in CUDA. */
export function positionText(index: string, chunk: number, ranks: number): string {
  if (chunk === 0) return index;
  const rank = `${index} / ${chunk}u / 2u`;
  return `(${rank} + ${index} / ${chunk}u % 2u * (${2 * ranks - 1}u - ${rank} * 2u)) * ${chunk}u + ${index} % ${chunk}u`;
}
