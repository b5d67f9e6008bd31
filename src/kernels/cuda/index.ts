/** The CUDA kernel of every op, by the op's name. */
import type { Arch } from "../../target.ts";
import type { Made, Use } from "../kernel.ts";
import { elementwise } from "./elementwise.ts";

export type CudaMaker = (use: Use, arch: Arch) => Made;

export const cudaKernels: Readonly<Record<string, CudaMaker>> = {
  ...elementwise,
};
