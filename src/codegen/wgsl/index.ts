/** The WGSL kernel of every op, by the op's name. An op without a kernel does not compile; programs for WebGPU have no fused ops. */
import type { OpName } from "../../../schemas/opNames.ts";
import { type FormulaOpName, type FusedOpName, mapFormulaOps } from "../../ops/index.ts";
import { invariant } from "../../ops/op.ts";
import type { WgslGenerator, WgslKernels } from "../kernelSpec.ts";
import { attention } from "./attention.ts";
import { balance } from "./balance.ts";
import { dispatch } from "./dispatch.ts";
import { elementwise } from "./elementwise.ts";
import { formulaKernel } from "./formula.ts";
import { gemm } from "./gemm.ts";
import { latent } from "./latent.ts";
import { moe } from "./moe.ts";
import { norm } from "./norm.ts";
import { orthogonalize } from "./orthogonalize.ts";
import { transport } from "./rearrange.ts";
import { rope } from "./rope.ts";
import { router } from "./router.ts";
import { vocab } from "./vocab.ts";

const handWritten = {
  ...attention,
  ...balance,
  ...elementwise,
  ...gemm,
  ...latent,
  ...moe,
  ...dispatch,
  ...norm,
  ...orthogonalize,
  ...rope,
  ...router,
  ...transport,
  ...vocab,
} satisfies WgslKernels<Exclude<OpName, FormulaOpName | FusedOpName>>;

// fused ops with a formula have no kernel: some have more operands than a kernel of WebGPU
const { swiglu_grad_again: _, swiglu_rows_grad_again: __, ...formulaKernels } = mapFormulaOps(formulaKernel);

/** The WGSL generators of all ops that programs for WebGPU may have. */
export const wgslKernels: Readonly<Record<Exclude<OpName, FusedOpName>, WgslGenerator>> = { ...handWritten, ...formulaKernels };

/** Returns the WGSL generator of an op. Throws an invariant for a fused op. */
export function wgslGenerator(op: OpName): WgslGenerator {
  const found = Object.entries(wgslKernels).find(([name]) => name === op)?.[1];
  invariant(found !== undefined, `no program for WebGPU has the op ${op}`);
  return found;
}
