/**
 * The targets a plan can be compiled for: `cpu` (each op's reference; no sources), `webgpu` with a profile of what an adapter
 * offers, `cuda` with an architecture.
 */
import type { Device, Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";

export const archs = ["sm_80", "sm_90a", "sm_100a"] as const;
export type Arch = (typeof archs)[number];

/** What an adapter must offer beyond WebGPU's default limits. Each profile includes those before it. */
export const profiles = ["baseline", "f16", "matrix"] as const;
export type Profile = (typeof profiles)[number];

/** All names a person may write. */
export const targetNames: readonly string[] = ["cpu", ...profiles.map((p) => `webgpu:${p}`), ...archs.map((a) => `cuda:${a}`)];

/** The target of each device: what a plan for it runs on. */
export const deviceTargets = {
  "a100-40gb": "cuda:sm_80",
  "a100-80gb": "cuda:sm_80",
  "h100-80gb": "cuda:sm_90a",
  "h200-141gb": "cuda:sm_90a",
  "b200-192gb": "cuda:sm_100a",
  cpu: "cpu",
} as const satisfies Record<Device, string>;

/** What a backend runs where nothing else is said; cuda has a target for each architecture. */
export function targetOf(backend: string): string {
  if (backend === "cuda")
    throw new Trouble("a job for CUDA needs to know the GPU", "say it, --target cuda:sm_90a (H100, H200), or compile the job first");
  return backend;
}

/** `webgpu` alone is the least profile that has the job's floats. */
export const targetFor = (target: string, { train }: Pick<Job, "train">): string =>
  target === "webgpu" && train.precision === "fp16" ? "webgpu:f16" : target;
