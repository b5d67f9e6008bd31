/**
 * Deterministic sums: to a scalar in two launches (blocks write partial sums to scratch, then one block adds them in a fixed order), and of
 * the columns of partial sums.
 */

import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelOperand, KernelSpec } from "../kernelSpec.ts";
import { attributeOf, type GeneratedLaunch, type KernelArg, scratch, scratchStart } from "../launchArgs.ts";
import { f32, source, vectorOf } from "./text.ts";

/** The addends of a sum to a scalar. */
export interface Sum {
  /** The operand with the elements `x` of the term. */
  readonly over: KernelOperand;
  readonly to: KernelOperand;
  readonly factor: number;
  readonly term: string;
  /** Additional inputs that `row` and the term index. */
  readonly indexed: readonly KernelOperand[];
  /** Elements per row; a vector does not cross the end of a row. */
  readonly width?: number;
  /** Statements before the elements of a vector. */
  readonly row: readonly string[];
}

const BLOCKS_EACH = 8;

/** Generates the kernel that stores the sum, or adds it if the output accumulates. */
export function makeSum(spec: KernelSpec, arch: Arch, { over, to, factor, term, indexed, width, row }: Sum): GeneratedKernel {
  const type = cudaType(over.dtype);
  const vector = vectorOf(width ?? over.size, [over.dtype]);
  const vectors = over.size / vector;
  const unroll = 4;
  const grid = Math.min(Math.ceil(over.size / (vector * unroll * 256)), cudaArchs[arch].multiprocessors * BLOCKS_EACH);
  const body = render("cuda/sum.cu", {
    ...{ name: spec.name, vector, unroll, grid, factor: f32(factor), term, type, row: [...row] },
    ...{ index: vectors + 1024 * grid < 2 ** 31 ? "u32" : "u64", end: vectors },
    params: [`const ${type}* xAt`, ...indexed.map((o) => `const ${cudaType(o.dtype)}* ${o.name}At`)].join(", "),
  });
  const last = addPartials(spec, grid, to);
  const args = [over.name, ...indexed.map((o) => o.name), scratchStart];
  return {
    source: source(spec, `${body}\n${last.body}`),
    scratch: grid * bytesOf.f32,
    launches: [{ entry: spec.name, grid: [grid, 1, 1], threads: 256, shared: 0, args }, last.launch],
  };
}

/** Returns the launch that sums `count` partial sums at the beginning of scratch and stores or adds the result to a scalar. */
export function addPartials(spec: KernelSpec, count: number, to: KernelOperand): { body: string; launch: GeneratedLaunch } {
  const entry = `${spec.name}_total`;
  const threads = count > 256 ? 1024 : 256;
  return {
    body: render("cuda/total.cu", { name: entry, count, threads, type: cudaType(to.dtype), adds: spec.accumulates.has(to.name) }),
    launch: { entry, grid: [1, 1, 1], threads, shared: 0, args: [scratchStart, to.name] },
  };
}

/** A sum over the rows of partial sums, per column. */
export interface PartialColumns {
  readonly rows: number;
  readonly width: number;
  readonly to: KernelOperand;
  /** The attribute with the row of `to` that receives the sums; default: the first row. */
  readonly row?: string;
  /** Bytes of scratch before the partial sums; default: none. */
  readonly first?: number;
}
/** Returns the launch that sums the columns of partial sums in scratch, one row per block of an earlier launch. */
export function sumColumns(
  spec: KernelSpec,
  { rows, width, to, row, first = 0 }: PartialColumns,
): { body: string; launch: GeneratedLaunch } {
  const entry = first === 0 ? `${spec.name}_sum` : `${spec.name}_sum_${to.name}`;
  const adds = spec.accumulates.has(to.name);
  return {
    body: render("cuda/column_reduce.cu", { name: entry, rows, width, type: cudaType(to.dtype), adds, row: row !== undefined }),
    launch: {
      ...{ entry, grid: [Math.ceil(width / 32), 1, 1], threads: 1024, shared: 0 },
      args: [scratch(first), to.name, ...(row === undefined ? [] : [attributeOf(row)])],
    },
  };
}

/** Returns the launch that sums `parts` matrices of `size` elements from byte `first` of scratch on and stores or adds the result. */
export function sumParts(
  spec: KernelSpec,
  parts: number,
  size: number,
  to: KernelOperand,
  first = 0,
): { body: string; launch: GeneratedLaunch } {
  const entry = first === 0 ? `${spec.name}_sum` : `${spec.name}_sum_${to.name}`;
  return {
    body: render("cuda/sum_parts.cu", { name: entry, parts, size, type: cudaType(to.dtype), adds: spec.accumulates.has(to.name) }),
    launch: { entry, grid: [Math.ceil(size / 1024), 1, 1], threads: 256, shared: 0, args: [scratch(first), to.name] },
  };
}

/** Returns the launch that fills an operand with zeros; its size is a multiple of 4 bytes. */
export const clearBuffer = (spec: KernelSpec, { name, dtype, size }: KernelOperand): { body: string; launch: GeneratedLaunch } =>
  clearBytes(spec, size * bytesOf[dtype], name);

/** Returns the launch that fills the first bytes of an argument with zeros, a multiple of 4. */
export function clearBytes(spec: KernelSpec, bytes: number, to: KernelArg): { body: string; launch: GeneratedLaunch } {
  const entry = `${spec.name}_clear`;
  const words = Math.ceil(bytes / 4);
  const grid = Math.min(4096, Math.ceil(words / 1024));
  return {
    body: render("cuda/clear.cu", { name: entry, words, grid }),
    launch: { entry, grid: [grid, 1, 1], threads: 256, shared: 0, args: [to] },
  };
}
