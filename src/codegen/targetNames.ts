/**
 * Names of targets: `cpu` (the reference of each op; no sources), `webgpu` with a profile of adapter features, `cuda` with an
 * architecture.
 */
import type { Device, Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";

/** CUDA architectures. */
export const archs = ["sm_80", "sm_90a", "sm_100a"] as const;
export type Arch = (typeof archs)[number];

/** Adapter features beyond WebGPU's defaults. Each profile includes the profiles before it. */
export const profiles = ["baseline", "f16", "matrix"] as const;
export type Profile = (typeof profiles)[number];

/** All values of `--target`. */
export const targetNames: readonly string[] = ["cpu", ...profiles.map((p) => `webgpu:${p}`), ...archs.map((a) => `cuda:${a}`)];

/** The target of each device. */
export const deviceTargets = {
  "a100-40gb": "cuda:sm_80",
  "a100-80gb": "cuda:sm_80",
  "h100-80gb": "cuda:sm_90a",
  "h200-141gb": "cuda:sm_90a",
  "b200-192gb": "cuda:sm_100a",
  cpu: "cpu",
} as const satisfies Record<Device, string>;

/** Returns the default target of a backend. Throws a Trouble for `cuda`, whose target depends on the GPU. */
export function targetOf(backend: string): string {
  if (backend === "cuda")
    throw new Trouble("a job for CUDA needs to know the GPU", "say it, --target cuda:sm_90a (H100, H200), or compile the job first");
  return backend;
}

/** Replaces `webgpu` by the smallest profile that supports the precision of the job; returns other targets unchanged. */
export const targetFor = (target: string, { train }: Pick<Job, "train">): string =>
  target === "webgpu" && train.precision === "fp16" ? "webgpu:f16" : target;
