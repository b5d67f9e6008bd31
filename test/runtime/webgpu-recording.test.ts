/**
 * The commands that are recorded for a plan: fewer calls, bind groups and GPUBuffers cost the host less per dispatch. On Dawn without a
 * device, which validates the commands as for any device.
 */
import { afterAll, expect, test } from "vitest";
import { create } from "webgpu";
import { runOn } from "../../runtime/train/loop.ts";
import { type WebgpuRanks, webgpuOn } from "../../runtime/webgpu/backend.ts";
import type { Plan } from "../../schemas/plan.ts";
import { blockOf } from "../../schemas/program.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";

const W = 32;
const job = jobOf({
  name: "recording",
  model: {
    ...{ layers: 2, hidden: W, ffn: W, heads: 4, kv_heads: 4, head_dim: W / 4, vocab: 256, seq: 16 },
    moe: { experts: 4, top_k: 2, ffn: W, router: { balance: "aux_loss", aux_coeff: 0.01 } },
  },
  parallel: { world: 1 },
  train: { micro_batch: 1, global_batch: 3, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
});
const { plan, sources } = compile(job, { target: await loadTarget("webgpu:baseline") });

const dawn = create(["backend=null"]);
// Dawn's objects do not keep what they came from
afterAll(() => expect(dawn).toBeDefined());
const host = { gpu: async () => dawn, noAdapter: () => new Error("Dawn has no null backend") as never };

/** All calls of WebGPU in a step, in order. */
async function recorded(localRanks: WebgpuRanks, plan: Plan) {
  const bound: GPUBindGroupDescriptor[] = [];
  const calls: string[] = [];
  let passes = 0;
  const { device } = localRanks;
  const spied = <T extends object>(
    on: T,
    names: readonly (keyof T)[],
    then: (result: unknown, name: string, args: unknown[]) => void,
  ): T => {
    for (const name of names) {
      const call = (on[name] as (...args: unknown[]) => unknown).bind(on);
      Object.defineProperty(on, name, {
        value: (...args: unknown[]) => {
          const result = call(...args);
          then(result, String(name), args);
          return result;
        },
      });
    }
    return on;
  };
  spied(device, ["createBindGroup"], (_, __, [d]) => bound.push(d as GPUBindGroupDescriptor));
  spied(device, ["createCommandEncoder"], (encoder) =>
    spied(encoder as GPUCommandEncoder, ["beginComputePass"], (pass) => {
      passes++;
      spied(pass as GPUComputePassEncoder, ["setPipeline", "setBindGroup", "dispatchWorkgroups"], (_, name) => calls.push(name));
    }),
  );
  const tokens = job.train.global_batch * job.model.seq;
  await runOn(plan, { localRanks, batch: () => ({ ids: new Int32Array(tokens), labels: new Int32Array(tokens) }) }).step();
  const count = (name: string): number => calls.filter((n) => n === name).length;
  return { bound, dispatches: count("dispatchWorkgroups"), groups: count("setBindGroup"), pipelines: count("setPipeline"), passes };
}

const launchesOf = new Map(plan.kernels.map((k) => [k.id, k.launches]));
const [program] = plan.programs as [Plan["programs"][number]];
/** Instructions in the order of a step, each as often as it runs. */
const issued = [...program.order.map((tag) => blockOf(program, tag)), program.step].flat().filter((i) => i.kind === "compute");

test("a dispatch binds one GPUBuffer of its rank, and an instruction sets one bind group for all its launches", async () => {
  const localRanks = await webgpuOn(host, plan, { kernel: (file) => sources.get(file)! });
  try {
    const { bound, dispatches, groups, pipelines, passes } = await recorded(localRanks, plan);
    for (const { label, entries } of bound) {
      const resources = [...entries].map(({ resource }) => resource as GPUBufferBinding);
      const storage = resources.filter(({ offset }) => offset !== undefined);
      // the table of initial weights is one for all ranks
      const shared = label?.startsWith("initial weights") ? 1 : 0;
      expect(new Set(storage.map(({ buffer }) => buffer)).size, label).toBe(1 + shared);
      expect(resources.length - storage.length, label).toBeLessThanOrEqual(1);
    }
    const drawn = bound.filter(({ label }) => label?.startsWith("initial weights")).length;
    expect(dispatches).toBe(issued.reduce((n, i) => n + launchesOf.get(i.kernel)!.length, 0) + drawn);
    // the launches of the backward pass of attention see ten buffers together, more than every adapter allows
    const further = issued.reduce((n, { op }) => n + (op === "attention_grad" ? 2 : 0), 0);
    expect(groups).toBeGreaterThanOrEqual(issued.length + further);
    // a pass that begins between two launches of an instruction has nothing set yet
    expect(groups).toBeLessThanOrEqual(issued.length + further + drawn + passes);
    expect(pipelines).toBeLessThan(dispatches);
    // a bind group is made once, not whenever it is set
    expect(bound.length).toBeLessThan(groups);
  } finally {
    await localRanks.close();
  }
});

test("launches that cannot share a bind group are those of attention's backward pass alone", () => {
  const apart = plan.kernels.filter(({ launches }) => new Set(launches.map((l) => JSON.stringify(l.args))).size > 1);
  expect([...new Set(apart.map(({ op }) => op))]).toEqual(["attention_grad"]);
});
