/** Products with weights on CUDA: each goes to the fastest kernel that its types, sizes and architecture allow. */

import type { Made, Use } from "../kernelSpec.ts";
import type { Arch } from "../targetNames.ts";
import { fitsHopper, hopper } from "./gemmHopper.ts";
import { mma, simt } from "./gemmTiles.ts";
import { halfOf, productOf } from "./product.ts";

const make = (use: Use, arch: Arch): Made => {
  const p = productOf(use);
  const half = halfOf(p);
  if (!half) return simt(use, p);
  return arch === "sm_90a" && fitsHopper(p) ? hopper(use, p, half) : mma(use, p, half);
};

export const gemm: Readonly<Record<string, typeof make>> = Object.fromEntries(
  ["gemm", "gemm_dgrad", "gemm_wgrad", "grouped_gemm", "grouped_dgrad", "grouped_wgrad"].map((op) => [op, make]),
);
