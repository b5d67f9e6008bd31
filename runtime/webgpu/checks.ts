/** The check of WebGPU for `rankc doctor`. */
import type { CheckList } from "../checkList.ts";
import { lookForWebgpu, type Survey } from "./probe.ts";

/** Adds the check of WebGPU. Returns the adapter, if there is one. */
export async function checkWebgpu(list: CheckList): Promise<Survey | undefined> {
  const survey = await lookForWebgpu(list.settings.webgpuLimit).catch((error: unknown) => list.fail(["webgpu"], "webgpu", error));
  if (survey) list.check(["webgpu"], "webgpu", () => [describeAdapter(survey)]);
  return survey;
}

function describeAdapter({ adapter, profiles, features, limits }: Survey): string {
  const list = (there: boolean): string => {
    const names = Object.entries(features).flatMap(([name, has]) => (has === there ? [name] : []));
    return names.join(", ") || "none";
  };
  const { maxBufferSize, maxStorageBufferBindingSize, maxComputeWorkgroupStorageSize } = limits;
  return [
    `${adapter}: supports ${profiles.map((name) => `webgpu:${name}`).join(", ")}`,
    `features: ${list(true)}; missing: ${list(false)}`,
    `a buffer holds ${gib(maxBufferSize)}, a binding ${gib(maxStorageBufferBindingSize)}, a workgroup ${maxComputeWorkgroupStorageSize / 1024} KiB`,
  ].join("\n");
}

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
