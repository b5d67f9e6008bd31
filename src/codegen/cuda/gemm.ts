/** Matrix products on CUDA: each goes to the fastest kernel that its types, sizes and architecture allow. */

import type { Arch } from "../../../schemas/devices.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec } from "../kernelSpec.ts";
import { productOf, productOps, sumOps } from "../matmul.ts";
import { fitsHopper, hopper } from "./gemmHopper.ts";
import { mma, simt } from "./gemmTiles.ts";
import { halfOf } from "./matmul.ts";

function multiply(spec: KernelSpec, arch: Arch): GeneratedKernel {
  const p = productOf(spec);
  const half = halfOf(p);
  if (!half) return simt(spec, p);
  return arch === "sm_90a" && fitsHopper(p) ? hopper(spec, p, half) : mma(spec, p, half);
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
};
