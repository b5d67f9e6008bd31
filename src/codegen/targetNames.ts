/**
 * Names of targets: `cpu` (the reference of each op; no sources), `webgpu` with a profile of adapter features, `cuda` with an
 * architecture.
 */
import { type Arch, archs } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
/** Adapter features beyond WebGPU's defaults. Each profile includes the profiles before it. */
export const profiles = ["baseline", "f16", "matrix"] as const;
/** The name of a WebGPU profile. */
export type Profile = (typeof profiles)[number];

/** All values of `--target`. */
export const targetNames: readonly string[] = ["cpu", ...profiles.map((p) => `webgpu:${p}`), ...archs.map((a) => `cuda:${a}`)];

/**
 * Fusions after lowering (src/passes/fuse.ts): the passes over a row of logits, sums of input gradients, sums that norms read, norms and
 * rotations of heads, outputs of activations, products with the activations that read them, unpermute with a sum, two products of one operand, one op
 * of the optimizer step on several tensors.
 */
export const fusions = [
  "statistics",
  "sums",
  "norm_sums",
  "heads",
  "activations",
  "epilogues",
  "combine",
  "twins",
  "tensor_lists",
] as const;
/**
 * Returns those of a CUDA target (test/results/cuda-fusion-2026-11-30.md). Products with a formula and pairs of products have kernels of their own
 * on Hopper alone; elsewhere they are several launches.
 */
const cudaFusions = (arch: Arch): Fusion[] => fusions.filter((name) => arch === "sm_90a" || (name !== "epilogues" && name !== "twins"));
/** The name of a fusion. */
export type Fusion = (typeof fusions)[number];

/** Returns the architecture of a CUDA target, whose kernels nvcc can compile with the plan; undefined for other targets. */
export const cudaArchOf = (target: string): Arch | undefined => archs.find((arch) => target === `cuda:${arch}`);

/** Returns the fusions of a target by its name, without loading it. */
export function fusionsOf(target: string): Fusion[] {
  const arch = cudaArchOf(target);
  return arch ? cudaFusions(arch) : [];
}

/** Replaces `webgpu` by the smallest profile that supports the precision of the job; returns other targets unchanged. */
export const targetFor = (target: string, { train }: Pick<Job, "train">): string =>
  target === "webgpu" && train.precision === "fp16" ? "webgpu:f16" : target;
