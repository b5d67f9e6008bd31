/**
 * WebGPU in Node: Dawn, from the npm package `webgpu`. It is loaded on first use, so that this module can be imported on any machine.
 */
/// <reference types="@webgpu/types" />
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type Sources, type WebgpuRanks, type WebgpuSettings, webgpuOn } from "./backend.ts";
import type { Host } from "./device.ts";

/** Opens all ranks of a plan on Dawn's adapter. */
export const openWebgpu = (plan: Plan, sources: Sources, settings: WebgpuSettings = {}): Promise<WebgpuRanks> =>
  webgpuOn(dawn, plan, sources, settings);

/** The WebGPU host of Node. */
export const dawn: Host = {
  async gpu({ enable, disable }) {
    const { create } = await loadDawn();
    return create([...listed("enable-dawn-features", enable), ...listed("disable-dawn-features", disable)]);
  },
  noAdapter: () =>
    new Trouble(
      `no WebGPU adapter: there is no GPU with a driver for ${driver()} here that this process can see`,
      `install the GPU's driver${process.platform === "linux" ? " and the Vulkan loader (Debian: libvulkan1; without a GPU: mesa-vulkan-drivers); `vulkaninfo --summary` must list it" : ""}, or compile the plan for the target cpu`,
      3,
    ),
};

const listed = (option: string, values: readonly string[]): string[] => (values.length ? [`${option}=${values.join(",")}`] : []);

async function loadDawn(): Promise<typeof import("webgpu")> {
  try {
    return await import("webgpu");
  } catch (error) {
    throw new Trouble(
      `WebGPU cannot be loaded on ${process.platform}-${process.arch}: ${error instanceof Error ? error.message.split("\n")[0] : error}`,
      "install the npm packages again on this machine; Dawn comes for Linux, macOS and Windows, on x64 and arm64",
      3,
    );
  }
}

const driver = (): string => (process.platform === "darwin" ? "Metal" : process.platform === "win32" ? "Direct3D 12" : "Vulkan");
