/** The WebGPU devices of tests of WGSL kernels: one that runs them, if this machine has an adapter, and one that validates them. */
import { afterAll } from "vitest";
import { create } from "webgpu";
import type { Executor } from "./contract.ts";
import { adapterEnv, noAdapter } from "./softwareAdapter.ts";
import { wgslExecutor } from "./wgslExecutor.ts";

interface Needs {
  /** Features and limits of the device that runs kernels; features that the adapter lacks are left out. */
  readonly features?: readonly GPUFeatureName[];
  readonly limits?: Readonly<Record<string, number>>;
  /** The same of the device that validates; `toggles`: options of Dawn. */
  readonly checked: { readonly features: readonly GPUFeatureName[]; readonly toggles?: readonly string[] };
}

/** Opens both devices, and destroys them after the tests of the file. `executor` is undefined if there is no adapter. */
export async function openWgslDevices({ features = [], limits = {}, checked: validation }: Needs): Promise<{
  readonly executor: Executor | undefined;
  /** Dawn without a device: it validates with the default limits of WebGPU. */
  readonly checked: GPUDevice;
}> {
  // the software adapter is visible after its environment is set
  const gpu = adapterEnv && !noAdapter ? create([]) : undefined;
  const adapter = await gpu?.requestAdapter();
  const device = await adapter?.requestDevice({
    requiredFeatures: features.filter((f) => adapter.features.has(f)),
    requiredLimits: limits,
  });
  const checker = create(["backend=null", ...(validation.toggles ?? [])]);
  const nullAdapter = await checker.requestAdapter();
  if (!nullAdapter) throw new Error("Dawn has no null backend");
  const checked = await nullAdapter.requestDevice({ requiredFeatures: [...validation.features] });
  // Dawn's objects do not keep the objects that they came from alive
  const kept: unknown[] = [gpu, adapter, checker, nullAdapter];
  afterAll(() => {
    device?.destroy();
    checked.destroy();
    kept.length = 0;
  });
  return { executor: device && adapter ? wgslExecutor(device, adapter.info.architecture) : undefined, checked };
}
