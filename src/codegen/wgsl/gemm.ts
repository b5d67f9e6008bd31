/**
 * Matrix products in WGSL. The tiling with the lowest estimated cost decides the kernel: matrix units are slower if tiles are few or mostly
 * empty.
 */
import { type GeneratedKernel, type KernelSpec, wgslKernel } from "../kernelSpec.ts";
import { productOf, productOps } from "../matmul.ts";
import type { Profile } from "../targetNames.ts";
import { gemmMatrix, matrixTiles } from "./gemmMatrix.ts";
import { gemmTiles, plainTiles } from "./gemmTiles.ts";
import { tilingOf } from "./matmul.ts";

function multiply(spec: KernelSpec, profile: Profile): GeneratedKernel {
  const p = productOf(spec);
  const matrix = profile === "matrix" && p.a.dtype === "f16" && p.b.dtype === "f16";
  const t = tilingOf(p, matrix ? [...matrixTiles, ...plainTiles] : plainTiles);
  const { tile } = t;
  return tile.by === "matrix" ? gemmMatrix(spec, p, { ...t, tile }) : gemmTiles(spec, p, { ...t, tile });
}

/** WGSL kernels of products. */
export const gemm = {
  gemm: wgslKernel(productOps.gemm, multiply),
  gemm_dgrad: wgslKernel(productOps.gemm_dgrad, multiply),
  gemm_wgrad: wgslKernel(productOps.gemm_wgrad, multiply),
  grouped_gemm: wgslKernel(productOps.grouped_gemm, multiply),
  grouped_dgrad: wgslKernel(productOps.grouped_dgrad, multiply),
  grouped_wgrad: wgslKernel(productOps.grouped_wgrad, multiply),
};
