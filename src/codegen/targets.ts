/**
 * Targets with their kernel generators. The kernel tables and templates of a target are imported when it is requested, so that compiling for
 * the CPU does not load them.
 */

import { archs, type Device, deviceNames, devices } from "../../schemas/devices.ts";
import { wgslFeature } from "../../schemas/dtypes.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { withoutText } from "../../templates/fill.ts";
import type { GeneratedKernel, KernelSpec } from "./kernelSpec.ts";
import { type Fusion, fusionsOf, profiles, targetNames } from "./targetNames.ts";

/** A backend with a profile or an architecture. */
export interface Target {
  /** The name in plans: `cpu`, `webgpu:baseline`, `cuda:sm_90a`. */
  readonly name: string;
  /** File name extension of sources. */
  readonly suffix: string;
  /** Whether the runtime runs `first_kernel` in the first microbatch of a step; otherwise all gradients are zero before. */
  readonly writesFirst?: true;
  /** Whether kernels of products and attention differ where collectives run beside them. */
  readonly dividesGrids?: true;
  /** The fusions for whose ops there are kernels (src/ops/fused.ts). */
  readonly fuses?: readonly Fusion[];
  /** Returns the kernel of a spec; undefined if the target runs the reference of the op. */
  generate(spec: KernelSpec): GeneratedKernel | undefined;
  /** Returns the kernel of the runtime that writes initial weights, with this name; absent if the runtime needs none from the plan. */
  readonly weights?: (name: string) => GeneratedKernel;
}

/** The target that runs the reference of each op. */
export const cpu: Target = { name: "cpu", suffix: "", generate: () => undefined };

/** Loads a target by name, such as `cpu`, `webgpu`, `webgpu:f16`, `cuda:sm_90a`. Throws a Trouble for an unknown name. */
export async function loadTarget(text: string): Promise<Target> {
  const [kind, detail] = text.split(":");
  if (text === "cpu") return cpu;
  if (kind === "webgpu") {
    const profile = profiles.find((p) => p === (detail ?? "baseline"));
    if (profile) {
      const { wgslGenerator } = await import("./wgsl/index.ts");
      const generate = (spec: KernelSpec): GeneratedKernel => {
        if (profile === "baseline" && wgslFeature(Object.values(spec.dtype)) === "f16")
          throw new Trouble(
            "the job trains in fp16, and webgpu:baseline has no 16-bit floats",
            "write --target webgpu:f16, or train.precision: fp32",
          );
        if (spec.d.tf32)
          throw new Trouble("the job multiplies in TF32, and WebGPU has no such products", "write train.matmul: f32, or another --target");
        return wgslGenerator(spec.op)(spec, profile);
      };
      return { name: `webgpu:${profile}`, suffix: "wgsl", generate };
    }
  }
  if (kind === "cuda") {
    const arch = archs.find((a) => a === detail);
    if (arch) {
      const [{ cudaKernels }, { weightsKernel }] = await Promise.all([import("./cuda/index.ts"), import("./cuda/weights.ts")]);
      return {
        name: text,
        suffix: "cu",
        writesFirst: true,
        ...(arch === "sm_90a" && { dividesGrids: true as const }),
        fuses: fusionsOf(text),
        generate: (spec) => cudaKernels[spec.op](spec, arch),
        weights: weightsKernel,
      };
    }
  }
  throw new Trouble(`there is no target ${text}`, `write one of ${targetNames.join(", ")}`);
}

/** Loads the target of each device for size estimates: a kernel that a target cannot generate counts no scratch; `compile` reports it as an error. */
export async function loadDeviceTargets(): Promise<(device: Device) => Target> {
  const load = async (device: Device) => [device, lenient(await loadTarget(devices[device].target))] as const;
  const loaded = new Map(await Promise.all(deviceNames.map(load)));
  return (device) => loaded.get(device) ?? cpu;
}

const lenient = ({ weights: _, ...target }: Target): Target => ({
  ...target,
  generate: (spec) => {
    try {
      // filling the templates in takes most of the time of a check
      return withoutText(() => target.generate(spec));
    } catch {
      return undefined;
    }
  },
});
