/**
 * Opens a WebGPU device with the features of a plan's profile. The host provides WebGPU: Dawn in Node (dawn.ts), the browser in a page.
 * Missing features, and later errors of the device, are Troubles.
 */
/// <reference types="@webgpu/types" />
import { Trouble } from "../../schemas/trouble.ts";

/** Constants of WebGPU, by its standard; Dawn for Node does not define them as globals. */
export const usage = { mapRead: 1, copySource: 4, copyTarget: 8, uniform: 64, storage: 128, queryResolve: 512 } as const;
/** GPUMapMode.READ. */
export const mapRead = 1;

interface Profile {
  readonly features: readonly string[];
  readonly unlock: readonly string[];
  readonly largeGroups: boolean;
}
/** The features that an adapter must have, by profile; `unlock`: the toggles with which Dawn offers them. */
export const profiles: Readonly<Record<string, Profile>> = {
  baseline: { features: [], unlock: [], largeGroups: false },
  f16: { features: ["shader-f16"], unlock: ["vulkan_enable_f16_on_nvidia"], largeGroups: true },
  matrix: {
    features: ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix"],
    unlock: ["vulkan_enable_f16_on_nvidia", "allow_unsafe_apis"],
    largeGroups: true,
  },
};

/** An open WebGPU device. */
export interface Gpu {
  readonly device: GPUDevice;
  /** The name of the adapter, with "(software)" if it is one. */
  readonly adapter: string;
  /** Allocates memory for kernels and copies. If there is no room, `done` throws. */
  make(label: string, bytes: number): GPUBuffer;
  /** Waits for work on the device. Throws the error of the device, if there is one, rather than an error that follows from it. */
  done<T>(work: Promise<T>): Promise<T>;
  /** Throws the error of the device, if there is one. */
  check(): void;
  /** Destroys the device. An open device of Dawn keeps the process alive. */
  close(): void;
}

/** The provider of WebGPU. */
export interface Host {
  /** Returns the entry point of WebGPU. Throws a Trouble if there is none. `toggles`: of Dawn; browsers ignore them. */
  gpu(toggles: { readonly enable: readonly string[]; readonly disable: readonly string[] }): Promise<GPU>;
  /** Returns the error for a machine without an adapter. */
  noAdapter(): Trouble;
}

/** Opens a device for a profile. `timestamps`: with the feature timestamp-query, if the adapter has it. Throws a Trouble if there is no suitable adapter. */
export async function openDevice(host: Host, profile: string, { timestamps = false } = {}): Promise<Gpu> {
  const needs = profiles[profile];
  if (!needs) throw new Trouble(`the plan is for webgpu:${profile}, a profile that this version does not know`, "compile the plan again");
  // with quantization, times are multiples of 100 µs
  const toggles = { enable: needs.unlock, disable: timestamps ? ["timestamp_quantization"] : [] };
  const gpu = await host.gpu(toggles);
  const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw host.noAdapter();
  const name = nameOf(adapter.info);
  const missing = needs.features.filter((f) => !adapter.features.has(f));
  if (missing.length)
    throw new Trouble(
      `the plan is for webgpu:${profile}, and the adapter ${name} has no ${missing.join(", no ")}`,
      `compile the plan for ${fallback(adapter)}, or run it on a GPU that has it`,
      3,
    );
  const device = await adapter.requestDevice(requestOf(adapter, needs, timestamps)).catch((error: unknown) => {
    throw new Trouble(
      `the GPU ${name} cannot be opened: ${error instanceof Error ? error.message : error}`,
      "see whether another program has taken it for itself, and whether its driver works (`vulkaninfo --summary`, `nvidia-smi`)",
      3,
    );
  });
  return new OpenGpu(gpu, device, name);
}

function requestOf(adapter: GPUAdapter, needs: Profile, timestamps: boolean): GPUDeviceDescriptor {
  const { limits } = adapter;
  return {
    requiredFeatures: [
      ...needs.features,
      ...(timestamps && adapter.features.has("timestamp-query") ? ["timestamp-query"] : []),
    ] as GPUFeatureName[],
    requiredLimits: {
      maxBufferSize: limits.maxBufferSize,
      maxStorageBufferBindingSize: limits.maxStorageBufferBindingSize,
      ...(needs.largeGroups && {
        maxComputeWorkgroupStorageSize: limits.maxComputeWorkgroupStorageSize,
        maxComputeInvocationsPerWorkgroup: limits.maxComputeInvocationsPerWorkgroup,
        maxComputeWorkgroupSizeX: limits.maxComputeWorkgroupSizeX,
      }),
    },
  };
}

class OpenGpu implements Gpu {
  readonly device: GPUDevice;
  readonly adapter: string;
  /** The entry point, referenced until `close`, because Dawn's objects do not keep it alive. */
  readonly #held: GPU[];
  /** The first error of the device; a lost device replaces it. */
  #error: Error | undefined;
  #isClosed = false;
  readonly #lost: Promise<void>;
  /** Checks of allocations that are under way. */
  readonly #allocations: Promise<void>[] = [];

  constructor(gpu: GPU, device: GPUDevice, adapter: string) {
    this.#held = [gpu];
    this.device = device;
    this.adapter = adapter;
    device.addEventListener("uncapturederror", (event) => {
      // `done` throws it; by default Dawn also prints it
      event.preventDefault();
      this.#error ??= troubleOf((event as GPUUncapturedErrorEvent).error, adapter);
    });
    this.#lost = device.lost.then(({ message }) => {
      // errors that follow from the loss may arrive first
      if (!this.#isClosed) this.#error = lostTrouble(adapter, message);
    });
  }

  make(label: string, bytes: number): GPUBuffer {
    this.device.pushErrorScope("out-of-memory");
    const buffer = this.device.createBuffer({ label, size: bytes, usage: usage.storage | usage.copySource | usage.copyTarget });
    const checked = this.device.popErrorScope().then((error) => {
      if (error) this.#error ??= outOfMemory(this.adapter, `no room for ${bytes} bytes, ${label}`);
    });
    // a scope fails only if the device is lost
    this.#allocations.push(checked.catch(() => {}));
    return buffer;
  }

  async done<T>(work: Promise<T>): Promise<T> {
    this.check();
    const result = await work.catch(async (error: unknown) => {
      // a lost device aborts maps; the error of the loss arrives about the same time and says more
      await Promise.race([this.#lost, new Promise((resolve) => setTimeout(resolve, 100))]);
      this.check();
      throw error;
    });
    await Promise.all(this.#allocations.splice(0));
    this.check();
    return result;
  }

  check(): void {
    if (this.#error) throw this.#error;
    if (this.#isClosed) throw new Error("rankc: the WebGPU device is closed");
  }

  close(): void {
    this.#isClosed = true;
    this.device.destroy();
    this.#held.length = 0;
  }
}

/** Returns the name of an adapter, with "(software)" if it is one. */
export function nameOf(info: GPUAdapterInfo): string {
  const name =
    [info.device, info.description].filter(Boolean).join(", ") ||
    [info.vendor, info.architecture].filter(Boolean).join(" ") ||
    "without a name";
  return info.isFallbackAdapter ? `${name} (software)` : name;
}

/** The largest profile that an adapter has. */
const fallback = (adapter: GPUAdapter): string =>
  `webgpu:${Object.entries(profiles).findLast(([, { features }]) => features.every((f) => adapter.features.has(f)))![0]}`;

/** Converts an error that no scope captured. */
function troubleOf(error: GPUError, adapter: string): Error {
  // Dawn's error classes are available only after it is loaded
  if (error.constructor.name === "GPUOutOfMemoryError") return outOfMemory(adapter, error.message);
  return new Error(`rankc: WebGPU refuses what the plan asks for: ${error.message}`);
}

const outOfMemory = (adapter: string, what: string): Trouble =>
  new Trouble(
    `the GPU ${adapter} is out of memory: ${what}`,
    "free the GPU of other programs, or make the job's share of a GPU smaller (train.micro_batch, more ranks); `rankc inspect` shows where memory goes",
    3,
  );

const lostTrouble = (adapter: string, message: string): Trouble =>
  new Trouble(
    `the GPU ${adapter} was lost: ${message.trim() || "the driver does not say why"}`,
    "its driver was reset or the GPU taken away, and what it held is gone: look into the system's log, then start again from the last checkpoint",
    3,
  );
