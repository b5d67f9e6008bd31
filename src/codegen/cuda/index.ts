/** The CUDA kernel of every op, by the op's name. An op without a kernel does not compile. */
import type { OpName } from "../../../schemas/opNames.ts";
import { type FormulaOpName, mapFormulaOps } from "../../ops/index.ts";
import type { CudaGenerator, CudaKernels } from "../kernelSpec.ts";
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
} satisfies CudaKernels<Exclude<OpName, FormulaOpName>>;

/** The CUDA generators of all ops. */
export const cudaKernels: Readonly<Record<OpName, CudaGenerator>> = { ...handWritten, ...mapFormulaOps(formulaKernel) };
