/** Plans for WebGPU: every kernel of the example plans compiles with what its profile has, and starts within default limits. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { create } from "webgpu";
import { profiles } from "../../src/codegen/targetNames.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { root } from "../support/checkout.ts";
import { byTier } from "../support/tiers.ts";

/** Dawn without a device. It checks sources and pipelines as for any device, with all features. */
const dawn = create(["backend=null", "enable-dawn-features=allow_unsafe_apis"]);
const features: Readonly<Record<(typeof profiles)[number], string[]>> = {
  baseline: [],
  f16: ["shader-f16"],
  matrix: ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix"],
};
const devices: GPUDevice[] = [];
afterAll(() => {
  for (const d of devices) d.destroy();
  // Dawn's objects do not keep what they came from
  expect(dawn).toBeDefined();
});

const folder = join(root, "plans");
const plans = readdirSync(folder, { withFileTypes: true }).filter((f) => f.isDirectory());
const [some, others] = byTier(
  plans.map((f) => f.name),
  (name) => ["tiny-mixtral", "tiny-shared-experts", "tiny-mla"].includes(name),
);
describe.each(some.rows)("%s", some.options, (name) => compiles(name));
describe.each(others.rows)("%s", others.options, (name) => compiles(name));

function compiles(name: string): void {
  // WebGPU has no bf16
  const text = readFileSync(join(folder, name, "job.yaml"), "utf8").replace("precision: bf16", "precision: fp32");

  test.each(profiles)("for the profile %s", async (profile) => {
    const adapter = await dawn.requestAdapter();
    const device = await adapter!.requestDevice({ requiredFeatures: features[profile] as GPUFeatureName[] });
    devices.push(device);
    const { plan, sources } = compile(readJob(text, name).job!, { target: await loadTarget(`webgpu:${profile}`) });
    expect(sources.size).toBe(plan.kernels.length);
    for (const { id, source, launches, scratch } of plan.kernels) {
      device.pushErrorScope("validation");
      const module = device.createShaderModule({ code: sources.get(source!.file)! });
      for (const { entry, grid, args } of launches) {
        device.createComputePipeline({ layout: "auto", compute: { module, entryPoint: entry } });
        expect(Math.max(...grid), id).toBeLessThanOrEqual(65535);
        for (const arg of args) {
          if (arg.kind === "scratch") expect(arg.offset, id).toBeLessThan(scratch);
        }
      }
      expect((await device.popErrorScope())?.message, `${id}\n${sources.get(source!.file)}`).toBeUndefined();
    }
    // a name appears once: so that launches of one kernel have different names, and so have kernels
    const entries = plan.kernels.flatMap((k) => k.launches.map((l) => l.entry));
    expect(new Set(entries).size).toBe(entries.length);
  });
}
