/** plans/tiny-mixtral trains on WebGPU as on the CPU: the losses of three steps, on one rank and on eight. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openRun, type RunSettings } from "../runtime/run.ts";
import { compile } from "../src/compile.ts";
import { loadTarget } from "../src/makers.ts";
import { readJob } from "../src/readJob.ts";
import { root } from "./checkout.ts";
import { noAdapter } from "./softwareAdapter.ts";
import { full } from "./tiers.ts";

const folder = join(root, "plans/tiny-mixtral");
const path = join(folder, "job.yaml");

async function losses(sets: readonly string[], backend: "cpu" | "webgpu"): Promise<number[]> {
  const { job } = readJob(readFileSync(path, "utf8"), path, sets);
  const { plan, sources } = compile(job!, { target: await loadTarget(backend === "cpu" ? "cpu" : "webgpu:baseline") });
  const settings: RunSettings = { backend, source: (file) => sources.get(file)!, baseDir: folder };
  const run = await openRun(plan, settings);
  try {
    const all: number[] = [];
    for (let step = 0; step < 3; step++) all.push((await run.step()).loss);
    return all;
  } finally {
    await run.close();
  }
}

describe.skipIf(noAdapter)(`on WebGPU${noAdapter ? `: skipped, ${noAdapter}` : ""}`, full, () => {
  const meshes = {
    "one rank": ["world=1", "tensor=1", "sequence=false", "pipeline=1", "expert=1", "distributed_optimizer=false"],
    "eight ranks: tensor 2, expert 4, pipeline 2": ["world=8"],
  };
  test.each(Object.entries(meshes))("%s", async (_, parallel) => {
    const sets = parallel.map((s) => `parallel.${s}`);
    const [got, want] = [await losses(sets, "webgpu"), await losses(sets, "cpu")];
    expect(want[2]).toBeLessThan(want[0]!);
    for (const [step, loss] of want.entries()) expect(Math.abs(got[step]! - loss), `step ${step + 1}`).toBeLessThan(1e-4);
  });
});
