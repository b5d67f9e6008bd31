/** The kernel with which the CUDA runtime writes initial weights (src/ops/normalDraw.ts) and those of checkpoints. It depends on no op, size or type of a job. */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel } from "../kernelSpec.ts";
import { attributeOf } from "../launchArgs.ts";
import { source } from "./text.ts";

const THREADS = 256;

/** Names of the numbers of a draw, in the order of the kernel's parameters; those of `ShardBox` and the key. */
const drawNumbers = ["rows", "height", "width", "row_stride", "plane_stride", "base_low", "base_high", "key0", "key1"] as const;

/** Names of the numbers of a block of a checkpoint, in the order of the kernel's parameters. */
const placeNumbers = ["rows", "columns", "stride", "row_step", "column_step", "to_low", "to_high", "type", "type16", "piece"] as const;

/** Returns the kernel. The runtime chooses the grid of each launch. */
export function weightsKernel(name: string): GeneratedKernel {
  const launch = (entry: string, pointers: readonly string[], numbers: readonly string[]) => ({
    ...{ entry, grid: [1, 1, 1] as [number, number, number], threads: THREADS, shared: 0 },
    args: [...pointers, ...numbers.map(attributeOf)],
  });
  return {
    source: source({ name, dtype: { out16: "f16" } }, render("cuda/weights.cu", { name, threads: THREADS })),
    launches: [
      launch(`${name}_draw`, ["table", "out", "table16", "out16"], drawNumbers),
      launch(`${name}_place`, ["source", "out", "out16", "bad"], placeNumbers),
    ],
  };
}
