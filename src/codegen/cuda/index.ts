/** The CUDA kernel of every op, by the op's name. */
import type { CudaGenerator } from "../kernelSpec.ts";
import { attention } from "./attention.ts";
import { balance } from "./balance.ts";
import { elementwise } from "./elementwise.ts";
import { gemm } from "./gemm.ts";
import { latent } from "./latent.ts";
import { moe } from "./moe.ts";
import { norm } from "./norm.ts";
import { optimizer } from "./optimizer.ts";
import { reduce } from "./reduce.ts";
import { rope } from "./rope.ts";
import { choice } from "./router.ts";
import { rows } from "./rows.ts";
import { messages } from "./transport.ts";
import { vocab } from "./vocab.ts";

export const cudaKernels: Readonly<Record<string, CudaGenerator>> = {
  ...attention,
  ...balance,
  ...choice,
  ...elementwise,
  ...gemm,
  ...latent,
  ...messages,
  ...moe,
  ...norm,
  ...optimizer,
  ...reduce,
  ...rope,
  ...rows,
  ...vocab,
};
