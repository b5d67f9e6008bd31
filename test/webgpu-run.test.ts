/** The same plan on WebGPU as on the CPU: losses and gradients, on one rank and on many, on a software adapter. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openRun } from "../runtime/execute.ts";
import { compile } from "../src/compile.ts";
import { readJob } from "../src/readJob.ts";
import { readTarget } from "../src/target.ts";
import { root } from "./checkout.ts";
import { noAdapter } from "./softwareAdapter.ts";
import { distance } from "./support.ts";

/** Losses of some steps, and the gradients of the last. */
async function train(path: string, sets: readonly string[], backend: "cpu" | "webgpu", steps: number) {
  const file = join(root, path);
  const { job, findings } = readJob(readFileSync(file, "utf8"), file, sets);
  expect(findings.filter((f) => f.level === "error")).toEqual([]);
  const { plan, sources } = compile(job!, { target: readTarget(backend) });
  const run = await openRun(plan, { backend, source: (name) => sources.get(name)!, baseDir: join(file, "..") });
  try {
    const losses: number[] = [];
    for (let step = 0; step < steps; step++) {
      const { loss, aux_loss, grad_norm } = await run.step();
      losses.push(loss, aux_loss, grad_norm);
    }
    return { losses, gradients: await run.gradients() };
  } finally {
    await run.close();
  }
}

async function same(path: string, sets: readonly string[], steps: number) {
  const [cpu, webgpu] = [await train(path, sets, "cpu", steps), await train(path, sets, "webgpu", steps)];
  for (const [i, want] of cpu.losses.entries()) expect(Math.abs(webgpu.losses[i]! - want), `number ${i}`).toBeLessThan(1e-4 * Math.max(1, want));
  for (const [name, want] of cpu.gradients) expect(distance(webgpu.gradients.get(name)!.data, want.data), name).toBeLessThan(1e-4);
}

describe.skipIf(noAdapter !== undefined)(`training on WebGPU${noAdapter ? ` (skipped: ${noAdapter})` : ""}`, () => {
  test("tiny-dense", () => same("plans/tiny-dense/job.yaml", [], 3), 120_000);
  test("tiny-mixtral on one rank", () => same("plans/tiny-mixtral/job.yaml", alone, 3), 120_000);
  test("tiny-mixtral on eight ranks: tensor, expert and pipeline", () => same("plans/tiny-mixtral/job.yaml", eight, 3), 240_000);
});

const alone = ["world=1", "tensor=1", "sequence=false", "pipeline=1", "expert=1", "distributed_optimizer=false"].map((s) => `parallel.${s}`);
const eight = ["world=8", "tensor=2", "pipeline=2", "expert=4"].map((s) => `parallel.${s}`);
