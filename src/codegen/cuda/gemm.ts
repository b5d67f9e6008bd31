/** Matrix products on CUDA: each goes to the fastest kernel that its types, sizes and architecture allow. */

import type { Arch } from "../../../schemas/devices.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec } from "../kernelSpec.ts";
import { epilogueOps, type MatrixProduct, productOf, productOps, sumOps, twinOps } from "../matmul.ts";
import { applyAfter } from "./epilogue.ts";
import { fitsHopper, hopper, joinsTwin } from "./gemmHopper.ts";
import { fitsTf32, tf32 } from "./gemmTf32.ts";
import { mma } from "./gemmTiles.ts";
import { transposedFirst } from "./gemmTransposed.ts";
import { halfOf } from "./matmul.ts";

function multiply(spec: KernelSpec, arch: Arch): GeneratedKernel {
  const product = productOf(spec);
  const { epilogue, twin } = product;
  const inHopper = hopperOf(product, arch);
  const tiled = inTiles(arch);
  const plain = (own: KernelSpec, p: MatrixProduct): GeneratedKernel => hopperOf(p, arch)?.(own) ?? tiled(own, p);
  if (twin && !(inHopper && joinsTwin(product))) return separately(spec, { ...product, twin }, plain);
  if (inHopper) return inHopper(spec);
  // a tensor map cannot have the product in scratch
  return epilogue ? applyAfter(spec, { ...product, epilogue }, arch, tiled) : tiled(spec, product);
}
/** Returns the maker of kernels that store the product alone, also in scratch. */
function inTiles(arch: Arch): (spec: KernelSpec, p: MatrixProduct) => GeneratedKernel {
  return (spec, p) => {
    const half = halfOf(p);
    if (half) return mma(spec, p, half);
    return arch === "sm_90a" && fitsTf32(p) ? tf32(spec, p) : transposedFirst(spec, p, arch);
  };
}
/** Returns the maker of Hopper's kernel of a product; undefined if this architecture or this product has none. */
function hopperOf(p: MatrixProduct, arch: Arch): ((spec: KernelSpec) => GeneratedKernel) | undefined {
  const half = halfOf(p);
  return half && arch === "sm_90a" && fitsHopper(p) ? (spec) => hopper(spec, p, half) : undefined;
}

/** Returns the kernels of both products of a pair, one after the other. */
function separately(
  spec: KernelSpec,
  { twin, ...first }: MatrixProduct & Required<Pick<MatrixProduct, "twin">>,
  kernelOf: (spec: KernelSpec, p: MatrixProduct) => GeneratedKernel,
): GeneratedKernel {
  const both = [first, { ...first, ...twin }].map((p, n) => kernelOf({ ...spec, name: `${spec.name}_${n + 1}` }, p));
  return {
    source: both.map(({ source }) => source).join("\n"),
    scratch: Math.max(...both.map(({ scratch = 0 }) => scratch)),
    launches: both.flatMap(({ launches }) => launches),
  };
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
  gemm_pair: cudaKernel(twinOps.gemm_pair, multiply),
  gemm_wgrad_pair: cudaKernel(twinOps.gemm_wgrad_pair, multiply),
  grouped_wgrad_pair: cudaKernel(twinOps.grouped_wgrad_pair, multiply),
  gemm_swiglu: cudaKernel(epilogueOps.gemm_swiglu, multiply),
  grouped_gemm_swiglu: cudaKernel(epilogueOps.grouped_gemm_swiglu, multiply),
  gemm_dgrad_swiglu: cudaKernel(epilogueOps.gemm_dgrad_swiglu, multiply),
  grouped_dgrad_swiglu: cudaKernel(epilogueOps.grouped_dgrad_swiglu, multiply),
};
