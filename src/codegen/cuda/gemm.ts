/** Matrix products on CUDA: each goes to the fastest kernel that its types, sizes and architecture allow. */

import type { Arch } from "../../../schemas/devices.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec } from "../kernelSpec.ts";
import { epilogueOps, type MatrixProduct, productOf, productOps, sumOps } from "../matmul.ts";
import { applyAfter } from "./epilogue.ts";
import { fitsHopper, hopper } from "./gemmHopper.ts";
import { mma, simt } from "./gemmTiles.ts";
import { halfOf } from "./matmul.ts";

function multiply(spec: KernelSpec, arch: Arch): GeneratedKernel {
  const product = productOf(spec);
  const half = halfOf(product);
  if (half && arch === "sm_90a" && fitsHopper(product)) return hopper(spec, product, half);
  const inTiles = (s: KernelSpec, p: MatrixProduct): GeneratedKernel => (half ? mma(s, p, half) : simt(s, p));
  const { epilogue } = product;
  return epilogue ? applyAfter(spec, { ...product, epilogue }, arch, inTiles) : inTiles(spec, product);
}

/** CUDA kernels of products. */
export const gemm = {
  gemm: cudaKernel(productOps.gemm, multiply),
  gemm_dgrad: cudaKernel(productOps.gemm_dgrad, multiply),
  gemm_wgrad: cudaKernel(productOps.gemm_wgrad, multiply),
  grouped_gemm: cudaKernel(productOps.grouped_gemm, multiply),
  grouped_dgrad: cudaKernel(productOps.grouped_dgrad, multiply),
  grouped_wgrad: cudaKernel(productOps.grouped_wgrad, multiply),
  gemm_dgrad_pair: cudaKernel(sumOps.gemm_dgrad_pair, multiply),
  gemm_dgrad_triple: cudaKernel(sumOps.gemm_dgrad_triple, multiply),
  grouped_dgrad_pair: cudaKernel(sumOps.grouped_dgrad_pair, multiply),
  gemm_swiglu: cudaKernel(epilogueOps.gemm_swiglu, multiply),
  grouped_gemm_swiglu: cudaKernel(epilogueOps.grouped_gemm_swiglu, multiply),
  gemm_dgrad_swiglu: cudaKernel(epilogueOps.gemm_dgrad_swiglu, multiply),
  grouped_dgrad_swiglu: cudaKernel(epilogueOps.grouped_dgrad_swiglu, multiply),
};
