/**
 * Kernels of the products with weights. All are one product of matrices; how the operands lie is told by `productOf`, and the tiling
 * that is done first decides how it is multiplied: matrix units lose where tiles are few or mostly empty.
 */

import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import type { Profile } from "../targetNames.ts";
import { gemm, plainTiles } from "./gemm.ts";
import { gemmMatrix, matrixTiles } from "./gemmMatrix.ts";
import { productOf, tilingOf } from "./product.ts";

function product(spec: KernelSpec, profile: Profile): GeneratedKernel {
  const p = productOf(spec);
  const matrix = profile === "matrix" && p.a.dtype === "f16" && p.b.dtype === "f16";
  const t = tilingOf(p, matrix ? [...matrixTiles, ...plainTiles] : plainTiles);
  const { tile } = t;
  return tile.by === "matrix" ? gemmMatrix(p, { ...t, tile }) : gemm(p, { ...t, tile });
}

export const linear: Readonly<Record<string, typeof product>> = {
  gemm: product,
  gemm_dgrad: product,
  gemm_wgrad: product,
  grouped_gemm: product,
  grouped_dgrad: product,
  grouped_wgrad: product,
};
