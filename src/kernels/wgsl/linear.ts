/** Kernels of the products with weights. All are one product of matrices; which operand lies how is told by `productOf`. */

import { gemm } from "./gemm.ts";
import type { WgslMaker } from "./index.ts";
import { productOf } from "./product.ts";

const product: WgslMaker = (use) => gemm(productOf(use));

export const linear: Readonly<Record<string, WgslMaker>> = {
  gemm: product,
  gemm_dgrad: product,
  gemm_wgrad: product,
  grouped_gemm: product,
  grouped_dgrad: product,
  grouped_wgrad: product,
};
