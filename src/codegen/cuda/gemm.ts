/** Products with weights on CUDA: each goes to the fastest kernel that its types, sizes and architecture allow. */

import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import type { Arch } from "../targetNames.ts";
import { fitsHopper, hopper } from "./gemmHopper.ts";
import { mma, simt } from "./gemmTiles.ts";
import { halfOf, productOf } from "./product.ts";

const make = (spec: KernelSpec, arch: Arch): GeneratedKernel => {
  const p = productOf(spec);
  const half = halfOf(p);
  if (!half) return simt(spec, p);
  return arch === "sm_90a" && fitsHopper(p) ? hopper(spec, p, half) : mma(spec, p, half);
};

export const gemm: Readonly<Record<string, typeof make>> = Object.fromEntries(
  ["gemm", "gemm_dgrad", "gemm_wgrad", "grouped_gemm", "grouped_dgrad", "grouped_wgrad"].map((op) => [op, make]),
);
