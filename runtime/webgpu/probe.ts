/**
 * What WebGPU there is on this machine, for the doctor. A process of its own looks, for Dawn and the drivers under it may block for
 * as long as they like, end the process, or say things to stderr that nobody asked for.
 */
/// <reference types="@webgpu/types" />
import { spawn } from "node:child_process";
import { Trouble } from "../../schemas/trouble.ts";
import { dawn } from "./dawn.ts";
import { nameOf, openDevice, profiles } from "./device.ts";

const features = ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix", "timestamp-query"] as const;
const limits = ["maxBufferSize", "maxStorageBufferBindingSize", "maxComputeWorkgroupStorageSize"] as const;

export interface Survey {
  /** What people call it; says so where it is software. */
  readonly adapter: string;
  /** Those of the targets webgpu:PROFILE that it serves, the plainest first; a device was opened for the last. */
  readonly profiles: readonly string[];
  /** Those that profiles and times of kernels rest on. */
  readonly features: Readonly<Record<(typeof features)[number], boolean>>;
  /** Bytes. */
  readonly limits: Readonly<Record<(typeof limits)[number], number>>;
}

type Answer = { readonly survey: Survey } | { readonly failed: string; readonly fix?: string };

/** How long a driver may take, in milliseconds; on one that works it is less than a second, a few when it starts. */
const patience = 20_000;
const marker = "rankc-looks-for-webgpu";
const brokenDriver = "see whether the GPU's driver works (`vulkaninfo --summary`, `nvidia-smi`); it may have to be installed again";

/** Throws a Trouble where there is no adapter, or looking for it fails or takes longer than `limit`. Leaves no process behind. */
export function lookForWebgpu(limit = patience): Promise<Survey> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, ["--input-type=module", "--eval", start(), marker], {
      stdio: ["ignore", "ignore", "pipe", "ipc"],
    });
    let said = "";
    child.stderr?.on("data", (chunk) => (said += chunk));
    const end = (settle: () => void): void => {
      clearTimeout(timer);
      // also where the driver never lets it end: nothing of it keeps this process
      child.kill("SIGKILL");
      if (child.connected) child.disconnect();
      child.stderr?.destroy();
      child.unref();
      settle();
    };
    const fail = (message: string, fix = brokenDriver): void => end(() => reject(new Trouble(message, fix, 3)));
    const timer = setTimeout(() => fail(`WebGPU did not answer for ${limit / 1000} s`), limit);
    child.once("message", (answer: Answer) => ("survey" in answer ? end(() => resolve(answer.survey)) : fail(answer.failed, answer.fix)));
    child.once("error", (error) => fail(`a process to look for WebGPU does not start: ${error.message}`, "see what the system says of it"));
    child.once("close", (code, signal) => {
      const words = said.trim();
      fail(`the process that looks for WebGPU ended by ${signal ?? `exit ${code}`}${words ? `: ${words}` : ""}`);
    });
  });
}

/** From a checkout, where this file is TypeScript, the process needs a loader. */
function start(): string {
  const here = JSON.stringify(import.meta.url);
  if (!import.meta.url.endsWith(".ts")) return `import(${here})`;
  const loader = JSON.stringify(import.meta.resolve("tsx/esm/api"));
  return `import(${loader}).then(({ register }) => (register(), import(${here})))`;
}

async function survey(): Promise<Survey> {
  const unlock = [...new Set(Object.values(profiles).flatMap((profile) => profile.unlock))];
  // held until all is read: Dawn's objects do not keep it
  const gpu = await dawn.gpu({ enable: unlock, disable: [] });
  const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw dawn.noAdapter();
  const found: Survey = {
    adapter: nameOf(adapter.info),
    profiles: Object.keys(profiles).filter((name) => profiles[name]!.features.every((f) => adapter.features.has(f))),
    features: record(features, (name) => adapter.features.has(name)),
    limits: record(limits, (name) => adapter.limits[name]),
  };
  (await openDevice(dawn, found.profiles.at(-1)!)).close();
  return found;
}

const record = <K extends string, V>(keys: readonly K[], value: (key: K) => V): Record<K, V> =>
  Object.fromEntries(keys.map((key) => [key, value(key)])) as Record<K, V>;

async function answer(): Promise<Answer> {
  try {
    return { survey: await survey() };
  } catch (error) {
    if (error instanceof Trouble && error.fix !== undefined) return { failed: error.message, fix: error.fix };
    return { failed: error instanceof Error ? error.message : String(error) };
  }
}

if (process.argv[1] === marker) process.send!(await answer());
