/** Sizes and scratch of Newton–Schulz kernels, shared by both GPU languages. */
import { newtonSchulz } from "../ops/newtonSchulz.ts";
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

/** Per iteration, where X is read and written: scratch and the output in turns. The number of iterations is odd, so the last writes the output. */
export const newtonSchulzSteps = Array.from({ length: newtonSchulz.iterations }, (_, i) =>
  i % 2 === 0 ? ({ from: "x", to: "y" } as const) : ({ from: "y", to: "x" } as const),
);
