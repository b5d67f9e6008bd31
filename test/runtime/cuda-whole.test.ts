/**
 * Whole CUDA plans without a GPU: their own kernels, compiled as C++ behind test/cuda-emulator, launched by the CUDA backend
 * before stand-ins for the driver and NCCL. This tests the interface of compiler and runtime: the order of parameters,
 * scratch, tensor maps, starts, several launches of one kernel, and the bytes they touch.
 */
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import type { LocalRanks } from "../../runtime/backend.ts";
import { openCpu } from "../../runtime/cpu/backend.ts";
import { koffi } from "../../runtime/cuda/libraries.ts";
import { openCorpus } from "../../runtime/data/corpus.ts";
import { heldOutOf } from "../../runtime/data/heldOut.ts";
import { readingOf } from "../../runtime/train/inputs.ts";
import { runOn } from "../../runtime/train/loop.ts";
import { isNumber } from "../../runtime/webgpu/pipelines.ts";
import { bytesOf } from "../../schemas/dtypes.ts";
import type { Launch, Plan } from "../../schemas/plan.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { root } from "../support/checkout.ts";
import { emulatorMissing, namespacesOf, SLOT } from "../support/cudaEmulator.ts";
import { type Ranks, standInRanks } from "../support/cudaRanks.ts";
import type { Kernels } from "../support/cudaStandIn.ts";
import { noCompiler } from "../support/cudaStandIn.ts";
import { distance, fixture, jobOf } from "../support/job.ts";
import { closeAll, train } from "../support/steps.ts";
import { byTier, full, isFull } from "../support/tiers.ts";

const missing = noCompiler || (await emulatorMissing().then((why) => (why ? ` [skipped: ${why}]` : "")));
const cache = join(root, "node_modules/.cache/rankc-cuda-emulator");
const headers = ["emulator.hpp", "hopper.hpp", "intrinsics.hpp"].map((file) => join(root, "test/cuda-emulator", file));
const options = ["-std=c++20", isFull ? "-O1" : "-Og", "-w", "-shared", "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden", "-x", "c++"];
const run = promisify(execFile);

let cuda: Ranks;
beforeAll(async () => {
  if (!missing) cuda = await standInRanks();
});
afterAll(() => vi.unstubAllEnvs());

/** A library of kernels. */
async function build(group: Plan["kernels"], sources: ReadonlyMap<string, string>): Promise<string> {
  const entries = group.flatMap((k) => [...new Set(k.launches.map((l) => l.entry))].map((entry) => ({ k, entry })));
  const cluster = (source: string, entry: string) => new RegExp(`__cluster_dims__\\((\\d+)[^{]*\\b${entry}\\(`).exec(source)?.[1] ?? 1;
  const text = [
    `#include ${JSON.stringify(headers[0])}`,
    ...group.map((k) => sources.get(k.source!.file)!),
    ...group.flatMap((k) => namespacesOf(sources.get(k.source!.file)!).map((name) => `using namespace ${name};`)),
    "const emulator::Entry emulator::entries[] = {",
    ...entries.map(({ k, entry }) => `  emulator::entry<${entry}>("${entry}", ${cluster(sources.get(k.source!.file)!, entry)}),`),
    "  {}};",
  ].join("\n");
  const digest = createHash("sha256")
    .update([text, ...headers.map((h) => readFileSync(h, "utf8"))].join("\0"))
    .digest("hex");
  const path = join(cache, `whole-${digest.slice(0, 16)}.so`);
  if (existsSync(path)) return path;
  mkdirSync(cache, { recursive: true });
  writeFileSync(`${path}.${process.pid}.cu`, text);
  await run("g++", [...options, "-o", `${path}.${process.pid}`, `${path}.${process.pid}.cu`], { maxBuffer: 1 << 26 });
  renameSync(`${path}.${process.pid}`, path);
  return path;
}

/** What launches of a plan's kernels do: the kernels themselves, emulated. */
async function emulated(plan: Plan, sources: ReadonlyMap<string, string>): Promise<Kernels> {
  const groups = Array.from({ length: 4 }, (_, n) => plan.kernels.filter((_, i) => i % 4 === n));
  const serve: Record<string, Kernels[string]> = {};
  const libraries = await Promise.all(groups.map((group) => build(group, sources)));
  for (const [n, group] of groups.entries()) {
    const launch = koffi()
      .load(libraries[n]!)
      .func("emulatorLaunch", "str", ["str", "void *", "uint32_t", "uint32_t", "void *", "uint32_t", "uint32_t"]);
    for (const k of group)
      for (const l of k.launches)
        serve[l.entry] = (params, { grid, threads, shared }) => {
          const wrong = launch(l.entry, Uint32Array.from(grid), threads, shared, copies(params, l), l.args.length, 0);
          if (wrong) throw new Error(`${l.entry}: ${wrong}`);
        };
  }
  return serve;
}

/** Packed parameters as the emulator takes them: one every SLOT bytes, tensor maps as emulator.hpp has them. */
function copies(params: DataView, { args }: Launch): Uint8Array {
  const out = new Uint8Array(SLOT * args.length);
  const view = new DataView(out.buffer);
  let at = 0;
  const next = (size: number, align = size): number => {
    at = Math.ceil(at / align) * align + size;
    return at - size;
  };
  for (const [n, arg] of args.entries()) {
    const to = SLOT * n;
    if (isNumber(arg)) view.setInt32(to, params.getInt32(next(4), true), true);
    else if (arg.kind === "tensors") {
      const from = next(8 * arg.count, 64);
      for (let i = 0; i < arg.count; i++) view.setBigUint64(to + 8 * i, params.getBigUint64(from + 8 * i, true), true);
    } else if (arg.kind !== "tensor_map") view.setBigUint64(to, params.getBigUint64(next(8), true), true);
    else {
      // the stand-in's map begins with the address it was given
      view.setBigUint64(to, params.getBigUint64(next(128, 64), true), true);
      for (const [i, x] of [arg.sizes.length, bytesOf[arg.dtype], arg.swizzle === "none" ? 0 : Number.parseInt(arg.swizzle, 10)].entries())
        view.setUint32(to + 8 + 4 * i, x, true);
      for (const [i, x] of arg.sizes.entries()) view.setBigUint64(to + 24 + 8 * i, BigInt(x), true);
      for (const [i, x] of arg.strides.entries()) view.setBigUint64(to + 64 + 8 * i, BigInt(x), true);
      for (const [i, x] of arg.box.entries()) view.setUint32(to + 104 + 4 * i, x, true);
    }
  }
  return out;
}

const model = { layers: isFull ? 2 : 1, hidden: 64, ffn: 64, heads: 2, kv_heads: 2, head_dim: 32, vocab: 256, seq: 16 };
const moe = { experts: 4, top_k: 2, ffn: 32, router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 } };
// bf16 rounds sums in another order, and a router near a tie chooses otherwise
const meshes = [
  ["fp32", { world: 1 }, 1e-5, 2e-3],
  ["bf16", { world: 4, tensor: 2, sequence: true, pipeline: 2, expert: 2, distributed_optimizer: true }, 5e-3, 0.4],
  ["fp32 with dropout and jitter", { world: 4, tensor: 2, sequence: true, context: 2, expert: 4 }, 1e-5, 2e-3],
  ["bf16 with dropout and jitter", { world: 2, tensor: 2, sequence: true, expert: 2 }, 5e-3, 0.4],
  ["fp32, tokens sent once to each rank,", { world: 4, tensor: 2, sequence: true, expert: 2, expert_tensor: 2 }, 1e-5, 2e-3],
  ["fp32, tokens sent once to each node,", { world: 4, tensor: 2, sequence: true, expert: 4 }, 1e-5, 2e-3],
  // the first step overflows by far, and the next ones have room
  ["fp16", { world: 4, tensor: 2, sequence: true, pipeline: 2, expert: 2, distributed_optimizer: true }, 5e-3, 0.4],
] as const;
const dispatchOf = (what: string): string =>
  what.includes("each node") ? "once_per_node" : what.includes("each rank") ? "once" : "all_to_all";
const loss_scale = { initial: 2 ** 40, hysteresis: 1, backoff: 2 ** -32 };

describe.skipIf(missing)(`whole plans, emulated${missing}`, () => {
  for (const { options, rows } of byTier(meshes, ([what]) => what === "bf16 with dropout and jitter"))
    test.each(rows)(
      "in %s on %j: the metrics of four steps are the CPU's within %f, the state after them within %f",
      options,
      async (what, parallel, ofMetrics, ofState) => {
        const [precision] = what.split(/,? /);
        const random = what.includes("dropout");
        const job = jobOf({
          name: "whole",
          model: random
            ? { ...model, dropout: { attention: 0.2, hidden: 0.1 }, moe: { ...moe, router: { ...moe.router, jitter: 0.05 } } }
            : { ...model, moe: { ...moe, dispatch: dispatchOf(what) } },
          parallel,
          cluster: { gpus_per_node: 2 },
          train: {
            ...{ micro_batch: 1, global_batch: 4, steps: 4, precision, optimizer: { lr: 1e-2 } },
            metrics: { parameter_norm: true, router_entropy: true },
            ...(precision === "fp16" ? { loss_scale } : {}),
          },
          data: { path: "corpus.txt" },
        });
        // a file has the operands of an instruction in another order, and ranks of a launch read their plan from one
        const read = (plan: Plan): Plan => parsePlan(printPlan(plan), "plan.json");
        const reference = read(compile(job).plan);
        const want = await train([openCpu(reference)], reference);
        const { plan: made, sources } = compile(job, { target: await loadTarget("cuda:sm_90a") });
        const plan = read(made);
        const mapped = plan.kernels.filter((k) => k.launches.some(({ args }) => args.some((arg) => arg.kind === "tensor_map")));
        if (precision !== "fp32") expect(new Set(mapped.map((k) => k.op))).toContain("grouped_gemm");
        cuda.serve(await emulated(plan, sources));
        const fleets = await cuda.openAll(plan);
        const got = await train(fleets, plan, cuda.step);
        await closeAll(fleets);
        expect(got.skipped).toEqual([precision === "fp16", false, false, false]);
        expect(want.skipped).toEqual(got.skipped);
        for (const [n, step] of want.metrics.entries())
          if (!want.skipped[n]) expect(distance(got.metrics[n]!, step), `metrics of step ${n + 1}`).toBeLessThan(ofMetrics);
        for (const [n, piece] of want.state.entries()) expect(distance(got.state[n]!, piece), `piece ${n}`).toBeLessThan(ofState);
      },
    );

  test("evaluations and logged steps are issued, captured and replayed on their own: the losses and norms of the CPU", full, async () => {
    const job = jobOf({
      name: "evaluated",
      model: { ...model, layers: 1 },
      train: {
        global_batch: 2,
        steps: 8,
        precision: "fp32",
        optimizer: { lr: 1e-2 },
        evaluation: { every: 1, steps: 3 },
        metrics: { parameter_norm: true },
      },
      data: { path: "corpus.txt", split: [9, 1] },
    });
    const of = async (localRanks: LocalRanks, plan: Plan) => {
      const { batch, heldOut } = openCorpus({ path: fixture("corpus.txt") }, readingOf(job));
      const own = runOn(plan, { localRanks, batch, heldOut: { validation: heldOutOf([heldOut("validation")], 3, readingOf(job)) } });
      const losses: number[] = [];
      for (let step = 0; step < 8; step++) {
        const { loss, parameter_norm } = await own.step({ detailed: step % 2 === 1 });
        expect(parameter_norm === undefined).toBe(step % 2 === 0);
        losses.push((await own.evaluate("validation")).loss, loss, parameter_norm ?? 0);
      }
      await own.close();
      return losses;
    };
    const reference = compile(job).plan;
    const want = await of(openCpu(reference), reference);
    const { plan, sources } = compile(job, { target: await loadTarget("cuda:sm_90a") });
    cuda.serve(await emulated(plan, sources));
    const [localRanks] = await cuda.openAll(plan);
    if (!localRanks) throw new Error("no rank was opened");
    expect(distance(await of(localRanks, plan), want)).toBeLessThan(1e-5);
  });
});
