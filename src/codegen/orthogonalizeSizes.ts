/** Sizes and scratch of Newton–Schulz kernels, shared by both GPU languages. */
import { type Coefficients, coefficientsOf } from "../ops/newtonSchulz.ts";
import type { KernelSpec } from "./kernelSpec.ts";

/** Elements that one workgroup sums for the norm of a matrix, and the largest number of workgroups of a matrix. */
const [PER_PART, MOST_PARTS] = [1 << 14, 256] as const;
/** Scratch addresses are multiples of 256 bytes. */
const aligned = (words: number): number => Math.ceil(words / 64) * 64;

/** Returns the sizes of the matrices [K,N], and the first word of each array in scratch: partial norms, X, Gram matrices, factors. */
export function orthogonalizeSizes({ d: { K: rows, N: columns } }: KernelSpec<string, "K" | "N">, matrices: number) {
  const [short, long] = rows < columns ? [rows, columns] : [columns, rows];
  const parts = Math.min(MOST_PARTS, Math.ceil((rows * columns) / PER_PART));
  const x = aligned(matrices * parts);
  const gram = x + aligned(matrices * rows * columns);
  const factor = gram + aligned(matrices * short * short);
  const words = factor + aligned(matrices * short * short);
  return { rows, columns, short, long, parts, at: { parts: 0, x, gram, factor }, words };
}

/** One iteration: where X is read and written, its coefficients, and the end of the names of its entries. */
export interface NewtonSchulzStep extends Coefficients {
  readonly from: "x" | "y";
  readonly to: "x" | "y";
  readonly suffix: string;
}

/**
 * Returns the iterations. X lies in scratch and in the output in turns; their number is odd, so that the last one writes the output.
 * Iterations with the same coefficients share entries.
 */
export function newtonSchulzSteps({ d }: KernelSpec<string, "K" | "N">): readonly NewtonSchulzStep[] {
  const all = coefficientsOf(d.coefficients);
  const isSame = new Set(all.map((each) => JSON.stringify(each))).size === 1;
  return all.map((each, i) => ({
    ...each,
    ...(i % 2 === 0 ? ({ from: "x", to: "y" } as const) : ({ from: "y", to: "x" } as const)),
    suffix: isSame ? "" : `_${i}`,
  }));
}

/** Returns the iterations whose entries with this key differ from those before. */
export const distinct = (steps: readonly NewtonSchulzStep[], key: (step: NewtonSchulzStep) => string): readonly NewtonSchulzStep[] =>
  steps.filter((step, i) => steps.findIndex((other) => key(other) === key(step)) === i);
