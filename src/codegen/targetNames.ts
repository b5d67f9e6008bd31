/**
 * Names of targets: `cpu` (the reference of each op; no sources), `webgpu` with a profile of adapter features, `cuda` with an
 * architecture.
 */
import { archs } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";

export { type Arch, archs } from "../../schemas/devices.ts";

/** Adapter features beyond WebGPU's defaults. Each profile includes the profiles before it. */
export const profiles = ["baseline", "f16", "matrix"] as const;
export type Profile = (typeof profiles)[number];

/** All values of `--target`. */
export const targetNames: readonly string[] = ["cpu", ...profiles.map((p) => `webgpu:${p}`), ...archs.map((a) => `cuda:${a}`)];

/** Returns the default target of a backend. Throws a Trouble for `cuda`, whose target depends on the GPU. */
export function targetOf(backend: string): string {
  if (backend === "cuda")
    throw new Trouble("a job for CUDA needs to know the GPU", "say it, --target cuda:sm_90a (H100, H200), or compile the job first");
  return backend;
}

/** Replaces `webgpu` by the smallest profile that supports the precision of the job; returns other targets unchanged. */
export const targetFor = (target: string, { train }: Pick<Job, "train">): string =>
  target === "webgpu" && train.precision === "fp16" ? "webgpu:f16" : target;
