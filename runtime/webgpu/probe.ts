/**
 * Probes WebGPU on this machine, for the doctor. The probe runs in a process of its own, because Dawn and the drivers below it may block,
 * end the process, or print to stderr.
 */
/// <reference types="@webgpu/types" />
import { spawn } from "node:child_process";
import { Trouble } from "../../schemas/trouble.ts";
import { importText, moduleUrl } from "../moduleUrl.ts";
import { dawn } from "./dawn.ts";
import { nameOf, openDevice, profiles } from "./device.ts";

const features = ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix", "timestamp-query"] as const;
const limits = ["maxBufferSize", "maxStorageBufferBindingSize", "maxComputeWorkgroupStorageSize"] as const;

/** The adapter: profiles, features and limits. */
export interface Survey {
  /** The name, with "(software)" if it is a software adapter. */
  readonly adapter: string;
  /** The supported targets webgpu:PROFILE, the smallest first. A device was opened for the last one. */
  readonly profiles: readonly string[];
  /** The features that profiles and kernel times need. */
  readonly features: Readonly<Record<(typeof features)[number], boolean>>;
  /** In bytes. */
  readonly limits: Readonly<Record<(typeof limits)[number], number>>;
}

type Answer = { readonly survey: Survey } | { readonly failed: string; readonly fix?: string };

/** The time limit of a driver in milliseconds. A working driver takes less than a second, or a few seconds at its first start. */
const patience = 20_000;
const marker = "rankc-looks-for-webgpu";
const brokenDriver = "see whether the GPU's driver works (`vulkaninfo --summary`, `nvidia-smi`); it may have to be installed again";

/** Probes the adapter. Throws a Trouble if there is none, or if the probe fails or takes longer than `limit`. Leaves no process behind. */
export function lookForWebgpu(limit = patience): Promise<Survey> {
  return new Promise((resolve, reject) => {
    const program = importText(moduleUrl("webgpu/probe", import.meta.url));
    const child = spawn(process.execPath, ["--input-type=module", "--eval", program, marker], {
      stdio: ["ignore", "ignore", "pipe", "ipc"],
    });
    let printed = "";
    child.stderr?.on("data", (chunk) => (printed += chunk));
    const end = (settle: () => void): void => {
      clearTimeout(timer);
      // the driver may keep the process of the probe alive: it must not keep this one alive
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
      const words = printed.trim();
      fail(`the process that looks for WebGPU ended by ${signal ?? `exit ${code}`}${words ? `: ${words}` : ""}`);
    });
  });
}

async function survey(): Promise<Survey> {
  const unlock = [...new Set(Object.values(profiles).flatMap((profile) => profile.unlock))];
  // a reference until the end: Dawn's objects do not keep it alive
  const gpu = await dawn.gpu({ enable: unlock, disable: [] });
  const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw dawn.noAdapter();
  const found: Survey = {
    adapter: nameOf(adapter.info),
    profiles: Object.entries(profiles).flatMap(([name, { features: all }]) => (all.every((f) => adapter.features.has(f)) ? [name] : [])),
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

if (process.argv[1] === marker) void answer().then((a) => process.send?.(a));
