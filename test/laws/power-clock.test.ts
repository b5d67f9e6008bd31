/** The clock that a power limit leaves: what it slows, that a step and its clock agree, and that a calibration takes it out of what it measured. */
import { expect, test } from "vitest";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { buffersOf } from "../../src/analysis/bufferTable.ts";
import { calibrated } from "../../src/analysis/estimate/calibrate.ts";
import { estimate } from "../../src/analysis/estimate/estimate.ts";
import { hardwareOf } from "../../src/analysis/estimate/hardware.ts";
import { kernelShape } from "../../src/analysis/estimate/kernelShape.ts";
import { KernelTimes } from "../../src/analysis/estimate/kernelTime.ts";
import { clockOf, settledClock } from "../../src/analysis/estimate/powerClock.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { timingsOf } from "../../src/analysis/estimate/timings.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";

const h200 = packageProfile("h200-141gb")!;
const free = { ...h200, kernels: { ...h200.kernels } };
delete (free.kernels as { power?: unknown }).power;
const limited = (limit: number): DeviceProfile => ({
  ...free,
  kernels: { ...free.kernels, power: { limit, arithmetic: 0.7, memory: 0.3 } },
});
const target = await loadTarget("cuda:sm_90a");
const planOf = (model: object, micro = 4, microbatches = 1) =>
  compile(
    jobOf({
      name: "powered",
      model: { layers: 2, hidden: 4096, ffn: 14336, heads: 32, vocab: 32768, seq: 2048, ...model },
      parallel: { world: 1 },
      train: {
        ...{ micro_batch: micro, global_batch: micro * microbatches, steps: 1, precision: "bf16" },
        optimizer: { type: "sgd", lr: 1e-3, momentum: 0 },
      },
      data: { path: "corpus.txt" },
      cluster: { device: "h200-141gb" },
    }),
    { target },
  ).plan;
const dense = planOf({});
const light = planOf({ hidden: 512, ffn: 512, heads: 8, vocab: 512, seq: 128 }, 1);

test("less power is never faster, lengthens arithmetic and leaves memory alone, and without a law nothing changes", () => {
  const seconds = [1.4, 1.25, 1.1, 1].map((limit) => estimate(dense, { profile: limited(limit) }));
  for (const [n, e] of seconds.entries()) if (n > 0) expect(e.seconds).toBeGreaterThan(seconds[n - 1]!.seconds);
  const unlimited = estimate(dense, { profile: free }).seconds;
  expect(estimate(dense, { profile: limited(2) }).seconds).toBe(unlimited);
  expect(seconds[0]!.seconds).toBeGreaterThanOrEqual(unlimited);
  const [most, least] = [seconds[0]!.stages[0]!.parts.kernels, seconds.at(-1)!.stages[0]!.parts.kernels];
  expect(least.products).toBeGreaterThan(1.1 * most.products);
  expect(least.optimizer).toBeCloseTo(most.optimizer, 9);
  // short kernels leave the device idle for most of a step
  expect(estimate(light, { profile: limited(1.25) }).seconds).toBe(estimate(light, { profile: free }).seconds);
});

test("a step and its clock agree", () => {
  const hardware = hardwareOf(h200);
  const load = { flops: 6e14, bytes: 1e12 };
  const secondsAt = (clock: number): number => 0.2 + 0.8 / clock;
  const { kernels } = limited(1.25);
  const clock = settledClock(kernels, hardware, load, secondsAt);
  expect(clock).toBeLessThan(1);
  expect(clockOf(kernels, hardware, load, secondsAt(clock))).toBeCloseTo(clock, 2);
  expect(settledClock(free.kernels, hardware, load, secondsAt)).toBe(1);
});

test("the clock of a step is that of the kernels that it runs: those of the first microbatch write, those of later ones add", () => {
  const plan = planOf({ hidden: 2048, ffn: 8192, seq: 1024 }, 1, 4);
  const { kernels: own } = free;
  const profile = { ...free, kernels: { ...own, launch_us: 0, power: { limit: 1.25, arithmetic: 0.2, memory: 0.8 } } };
  const { runs, step } = estimate(plan, { profile }).simulation.stages[0]!;
  const buffers = buffersOf(plan.programs[0]!);
  const kernels = [...runs.map(({ block }) => block), step].flatMap(({ instructions }) =>
    instructions.flatMap(({ instruction: i, seconds }) =>
      i.kind === "compute" ? [{ seconds, shape: kernelShape(i, plan.mesh, buffers) }] : [],
    ),
  );
  const sum = (of: (kernel: (typeof kernels)[number]) => number): number => kernels.reduce((all, kernel) => all + of(kernel), 0);
  const load = { flops: sum(({ shape }) => shape.flops), bytes: sum(({ shape }) => shape.bytes) };
  const clock = clockOf(
    profile.kernels,
    hardwareOf(profile),
    load,
    sum(({ seconds }) => seconds),
  );
  expect(clock).toBeLessThan(0.95);
  const times = new KernelTimes(profile);
  const expected = sum(({ shape }) => times.timeOf(shape, clock).seconds);
  expect(Math.abs(sum(({ seconds }) => seconds) / expected - 1)).toBeLessThan(2e-3);
});

test("a calibration on a machine whose power limits the clock gives the times at the full clock, and with them the same steps", () => {
  const machine = { ...limited(1.1), kernels: { ...limited(1.1).kernels, launch_us: 0 } };
  const source = { name: "own", device: "h200-141gb", stack: "rankc", from: "a test", date: "2026-11-30" };
  const run = (plan: typeof dense) => ({ plan, steps: [timingsOf(plan, estimate(plan, { profile: machine }).simulation)] });
  const own = calibrated({ ...machine, kernels: { ...machine.kernels, measured: [] } }, [run(dense), run(light)], source);
  for (const plan of [dense, light]) {
    const [again, real] = [own, machine].map((profile) => estimate(plan, { profile }).seconds);
    expect(Math.abs(again! / real! - 1)).toBeLessThan(0.01);
  }
  const widest = own.kernels.measured.filter(({ op, sizes }) => op === "gemm" && sizes.n === 32768);
  expect(widest.length).toBe(1);
  const shape = { op: "gemm", family: "product" as const, dtype: "bf16" as const, sizes: widest[0]!.sizes };
  const { m = 1, n = 1, k = 1 } = shape.sizes;
  const work = { flops: 2 * m * n * k, bytes: 2 * (m * k + k * n + m * n) };
  const full = new KernelTimes(machine).timeOf({ ...shape, ...work }).seconds;
  expect(Math.abs((1e-6 * widest[0]!.us) / full - 1)).toBeLessThan(0.02);
});

test("a product whose width 8 does not divide is not taken for one of a width near it", () => {
  const times = new KernelTimes(h200);
  const router = (op: string, n: number) =>
    times.timeOf({
      op,
      family: "product",
      dtype: "bf16",
      flops: 2 * 8192 * n * 2048,
      bytes: 2 * 8192 * 2048,
      sizes: { m: 8192, n, k: 2048, experts: 1 },
    });
  expect(router("gemm unaligned", 60).seconds).toBeGreaterThan(3 * router("gemm", 64).seconds);
  const plan = planOf({ hidden: 2048, moe: { experts: 60, top_k: 4, ffn: 1408 } }, 1);
  const own = calibrated(h200, [{ plan, steps: [timingsOf(plan, estimate(plan, { profile: h200 }).simulation)] }], {
    ...{ name: "own", device: "h200-141gb", stack: "rankc", from: "a test", date: "2026-11-30" },
  });
  expect(own.kernels.measured.filter(({ op }) => op.includes("unaligned")).every(({ sizes }) => sizes.n === 60 || sizes.k === 60)).toBe(
    true,
  );
  expect(own.kernels.measured.some(({ op }) => op === "gemm_wgrad unaligned")).toBe(true);
});
