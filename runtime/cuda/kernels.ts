/**
 * The kernels of a plan on one device: cubins of the plan, or cubins that NVRTC compiles and that the user's cache keeps. Several sources
 * compile at the same time. The ranks of one machine begin at different kernels, so that they share the work through the cache.
 */

import { createHash } from "node:crypto";
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { availableParallelism, homedir, totalmem } from "node:os";
import { join } from "node:path";
import { entryOf, sourceOf } from "../../schemas/lookup.ts";
import type { Kernel, Launch, Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder } from "../../schemas/writing.ts";
import { type CompilePool, openCompilePool } from "./compilePool.ts";
import type { Context, CudaDevice, KernelFunction } from "./driver.ts";
import { nvrtcVersion } from "./nvrtc.ts";

/** The options of NVRTC and nvcc for all sources, in addition to the architecture. */
export const compileOptions = ["--std=c++17"] as const;

/** Returns the file name of a kernel's cubin. It contains the digest of the source, so a cubin of another source has another name. */
export function cubinFile(kernel: Kernel, arch: string): string {
  const { file, sha256 } = sourceOf(kernel);
  return `${file.replace(/\.cu$/, "")}.${sha256.slice(0, 16)}.${arch}.cubin`;
}

/** Access to the kernel files of a plan. */
export interface KernelFiles {
  /** Returns the source of a kernel by its file name. */
  readonly source: (file: string) => string;
  /** Returns a cubin of the plan by its file name; undefined if there is none. */
  readonly cubin?: (file: string) => Uint8Array | undefined;
}
/** The loaded kernels of a plan. */
export interface LoadedKernels {
  /** Returns the function of one launch of a kernel. */
  readonly entry: (kernel: Kernel, launch: Launch) => KernelFunction;
  readonly close: () => void;
}

/** Returns the architecture that a plan is compiled for. Throws a Trouble if the device cannot run it. */
export function archFor(plan: Plan, device: CudaDevice): string {
  const [kind, arch = ""] = plan.toolchain.target.split(":");
  if (kind !== "cuda")
    throw new Trouble(
      `${printable(plan.job.name)} is compiled for ${plan.toolchain.target}, and not for CUDA`,
      "compile it with --target cuda:sm_90a, or as the device is",
    );
  const [, digits, exact] = /^sm_(\d+)(a?)$/.exec(arch)!;
  const sm = Number(digits);
  // cubins run on later devices of their generation; those of an architecture with the suffix `a` on that architecture only
  const serves = exact ? device.sm === sm : Math.floor(device.sm / 10) === Math.floor(sm / 10) && device.sm >= sm;
  if (serves) return arch;
  throw new Trouble(
    `${printable(plan.job.name)} is compiled for cuda:${arch}, and device ${device.ordinal} (${device.name}) is of compute capability ${device.sm / 10}`,
    `compile it for this device: --target cuda:sm_${device.sm}${device.sm >= 90 ? "a" : ""}`,
    3,
  );
}

/** Loads the kernels with these ids. `rank` determines at which of them this process begins to compile. */
export async function loadKernels(
  context: Context,
  {
    plan,
    ids,
    files,
    rank,
    onProgress,
  }: {
    readonly plan: Plan;
    readonly ids: ReadonlySet<string>;
    readonly files: KernelFiles;
    readonly rank: number;
    readonly onProgress?: (line: string) => void;
  },
): Promise<LoadedKernels> {
  const arch = archFor(plan, context.device);
  const used = plan.kernels.filter((k) => ids.has(k.id));
  const first = Math.floor(((rank % plan.mesh.gpus_per_node) * used.length) / plan.mesh.gpus_per_node);
  const queue = [...used.slice(first), ...used.slice(0, first)];
  const modules = new Map<string, ReturnType<Context["load"]>>();
  const entries = new Map<string, KernelFunction>();

  const pool = openCompilePool(mostCompilers());
  let made = 0;
  const compile: Compile = async (source, options) => {
    onProgress?.(`compiling kernels with NVRTC: ${made} done; they are kept in ${cacheFolder()}`);
    const image = await pool.compile(source, options);
    made++;
    return image;
  };

  async function load(kernel: Kernel): Promise<void> {
    const known = kernel.cubin && files.cubin?.(kernel.cubin.file);
    const image = known ?? (await compiled(kernel, arch, files.source(sourceOf(kernel).file), compile));
    await naming(kernel, () => {
      const module = context.load(image);
      modules.set(kernel.id, module);
      const shared = new Map<string, number>();
      for (const { entry, shared: bytes } of kernel.launches) shared.set(entry, Math.max(bytes, shared.get(entry) ?? 0));
      for (const [name, bytes] of shared) {
        const entry = context.kernel(module, name);
        entries.set(`${kernel.id} ${name}`, entry);
        allowShared(context, name, entry, bytes);
      }
    });
  }
  const work = async (): Promise<void> => {
    for (let kernel = queue.shift(); kernel; kernel = queue.shift()) await load(kernel);
  };
  const workers = await Promise.allSettled(Array.from({ length: Math.min(mostCompilers(), queue.length) }, work));
  pool.close();
  for (const w of workers) if (w.status === "rejected") throw w.reason;

  return {
    entry: (kernel, launch) => entryOf(entries, `${kernel.id} ${launch.entry}`, "function of a kernel"),
    close: () => {
      for (const module of modules.values()) context.unload(module);
    },
  };
}

/** The shared memory of a launch in bytes, static and dynamic, that needs no permission. */
const sharedUnasked = 48 << 10;

function allowShared(context: Context, name: string, entry: KernelFunction, bytes: number): void {
  const own = context.sharedOf(entry);
  if (own + bytes <= sharedUnasked) return;
  if (own + bytes > context.sharedLimit)
    throw new Error(
      `${name} wants ${own} + ${bytes} bytes of shared memory, and a block of ${context.device.name} may have ${context.sharedLimit}`,
    );
  context.allowShared(entry, bytes);
}

/** Adds the kernel to an error. */
async function naming<T>(kernel: Kernel, act: () => T | Promise<T>): Promise<T> {
  try {
    return await act();
  } catch (error) {
    throw named(kernel, error);
  }
}
/** Adds the name of the kernel to an error, and returns it. */
export function named(kernel: Kernel, error: unknown): unknown {
  if (!(error instanceof Error)) return error;
  const message = `kernel ${kernel.id} (${kernel.op} in ${kernel.dtypes}): ${error.message}`;
  return error instanceof Trouble ? new Trouble(message, error.fix, error.exit) : new Error(message, { cause: error });
}

type Compile = CompilePool["compile"];
/** A process of NVRTC takes about 200 MB. */
const mostCompilers = (): number => Math.max(1, Math.min(availableParallelism(), Math.floor(totalmem() / 2 ** 29)));

async function compiled(kernel: Kernel, arch: string, source: string, compile: Compile): Promise<Uint8Array> {
  const { version } = nvrtcVersion();
  const digest = createHash("sha256")
    .update(JSON.stringify([version, arch, compileOptions, source]))
    .digest("hex");
  const path = join(cacheFolder(), `${digest}.cubin`);
  const known = cached(path);
  if (known) return known;
  const image = await naming(kernel, () => compile(source, { arch, name: sourceOf(kernel).file, options: compileOptions }));
  keep(path, image);
  return image;
}

const cacheFolder = (): string => join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "rankc", "cubin");

function cached(path: string): Uint8Array | undefined {
  try {
    return readFileSync(path);
  } catch {
    return undefined;
  }
}

/** Writes a file atomically, because other ranks read the cache. If the cache cannot be written, nothing is cached. */
function keep(path: string, image: Uint8Array): void {
  const whole = `${path}.${process.pid}`;
  try {
    makeFolder(cacheFolder());
    writeFileSync(whole, image);
    renameSync(whole, path);
  } catch {
    return;
  }
}
