/**
 * Opens a WebGPU device with what a plan's profile needs, through whoever has WebGPU here: Dawn in Node (dawn.ts), the browser
 * in a page. What is missing, and what goes wrong later, is a Trouble.
 */
/// <reference types="@webgpu/types" />
import { Trouble } from "../../schemas/trouble.ts";

/** The constants of WebGPU; standard numbers, which Dawn for Node keeps out of the global scope. */
export const usage = { mapRead: 1, copySource: 4, copyTarget: 8, uniform: 64, storage: 128, queryResolve: 512 } as const;
export const mapRead = 1;

/** What an adapter must offer beyond the defaults, by profile; and what Dawn must be told (its toggles) so that it offers it. */
export const profiles: Readonly<Record<string, { features: readonly string[]; unlock: readonly string[]; largeGroups: boolean }>> = {
  baseline: { features: [], unlock: [], largeGroups: false },
  f16: { features: ["shader-f16"], unlock: ["vulkan_enable_f16_on_nvidia"], largeGroups: true },
  matrix: {
    features: ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix"],
    unlock: ["vulkan_enable_f16_on_nvidia", "allow_unsafe_apis"],
    largeGroups: true,
  },
};

export interface Gpu {
  readonly device: GPUDevice;
  /** What people call the adapter; says so where it is software. */
  readonly adapter: string;
  /** Memory for kernels and copies. That there is no room is told by `done`. */
  make(label: string, bytes: number): GPUBuffer;
  /** Waits for work on the device; throws what went wrong by then instead of what came of it. */
  done<T>(work: Promise<T>): Promise<T>;
  /** Throws what went wrong since the device was opened. */
  check(): void;
  /** The process may end by itself afterwards: Dawn keeps it alive while a device lives. */
  close(): void;
}

/** Who has WebGPU here. */
export interface Host {
  /** Throws a Trouble where there is none. `toggles` are Dawn's, for who may set them. */
  gpu(toggles: { readonly enable: readonly string[]; readonly disable: readonly string[] }): Promise<GPU>;
  /** What to tell a person where no adapter is found. */
  noAdapter(): Trouble;
}

export async function openDevice(host: Host, profile: string, { timestamps = false } = {}): Promise<Gpu> {
  const needs = profiles[profile];
  if (!needs) throw new Trouble(`the plan is for webgpu:${profile}, a profile that this version does not know`, "compile the plan again");
  // without the latter, times come in steps of 100 µs
  const toggles = { enable: needs.unlock, disable: timestamps ? ["timestamp_quantization"] : [] };
  // kept until close: Dawn's objects do not keep it
  let gpu: GPU | undefined = await host.gpu(toggles);
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
  const offered = adapter.limits;
  const asked = adapter.requestDevice({
    requiredFeatures: [
      ...needs.features,
      ...(timestamps && adapter.features.has("timestamp-query") ? ["timestamp-query"] : []),
    ] as GPUFeatureName[],
    requiredLimits: {
      maxBufferSize: offered.maxBufferSize,
      maxStorageBufferBindingSize: offered.maxStorageBufferBindingSize,
      ...(needs.largeGroups
        ? {
            maxComputeWorkgroupStorageSize: offered.maxComputeWorkgroupStorageSize,
            maxComputeInvocationsPerWorkgroup: offered.maxComputeInvocationsPerWorkgroup,
            maxComputeWorkgroupSizeX: offered.maxComputeWorkgroupSizeX,
          }
        : {}),
    },
  });
  const device = await asked.catch((error: unknown) => {
    throw new Trouble(
      `the GPU ${name} cannot be opened: ${error instanceof Error ? error.message : error}`,
      "see whether another program has taken it for itself, and whether its driver works (`vulkaninfo --summary`, `nvidia-smi`)",
      3,
    );
  });

  let wrong: Error | undefined;
  let closed = false;
  device.addEventListener("uncapturederror", (event) => {
    // told by `done`; Dawn would also print it
    event.preventDefault();
    wrong ??= troubleOf((event as GPUUncapturedErrorEvent).error, name);
  });
  const lost = device.lost.then(({ message }) => {
    // what comes of a lost device, and is told first, is not the reason
    if (!closed) wrong = lostTrouble(name, message);
  });
  const check = (): void => {
    if (wrong) throw wrong;
    if (closed) throw new Error("rankc: the WebGPU device is closed");
  };
  const making: Promise<void>[] = [];
  return {
    device,
    adapter: name,
    check,
    make(label, bytes) {
      device.pushErrorScope("out-of-memory");
      const buffer = device.createBuffer({ label, size: bytes, usage: usage.storage | usage.copySource | usage.copyTarget });
      const made = device.popErrorScope().then((error) => {
        if (error) wrong ??= outOfMemory(name, `no room for ${bytes} bytes, ${label}`);
      });
      // where the scope itself is lost, so is the device
      making.push(made.catch(() => {}));
      return buffer;
    },
    async done(work) {
      check();
      const result = await work.catch(async (error: unknown) => {
        // a map that is broken off says less than the loss that broke it off, which is told at the same time
        await Promise.race([lost, new Promise((resolve) => setTimeout(resolve, 100))]);
        check();
        throw error;
      });
      await Promise.all(making.splice(0));
      check();
      return result;
    },
    close() {
      closed = true;
      device.destroy();
      gpu = undefined;
    },
  };
}

/** What people call an adapter; says so where it is software. */
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

/** What Dawn tells of an error that nobody waited for. */
function troubleOf(error: GPUError, adapter: string): Error {
  // Dawn's errors are of no class that can be named without loading it
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
