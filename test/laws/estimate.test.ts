/** Estimates: parts add up, nothing is faster than what it consists of, faster links never slow a step down, and bubbles are those of the literature. */
import fc from "fast-check";
import { expect, test } from "vitest";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import type { Plan } from "../../schemas/plan.ts";
import { sumOfParts } from "../../src/analysis/estimate/blockRun.ts";
import { type Estimate, estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { type SimulatedStage, simulate } from "../../src/analysis/estimate/simulate.ts";
import { StageClock } from "../../src/analysis/estimate/stageClock.ts";
import { blockTimer, type TimedBlock } from "../../src/analysis/estimate/timedBlocks.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";
import { once } from "../support/tiers.ts";

const h100 = packageProfile("h100-80gb")!;

const planOf = (parallel: object, more: { readonly layers?: number; readonly batch?: number; readonly moe?: boolean } = {}): Plan => {
  const { layers = 4, batch = 16, moe = true } = more;
  return compile(
    jobOf({
      name: "estimated",
      model: {
        ...{ layers, hidden: 256, ffn: 512, heads: 8, vocab: 512, seq: 256 },
        ...(moe ? { moe: { experts: 8, top_k: 2, ffn: 256 } } : {}),
      },
      parallel,
      train: { micro_batch: 1, global_batch: batch, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
      data: { path: "corpus.txt" },
      cluster: { device: "h100-80gb", gpus_per_node: 4 },
    }),
  ).plan;
};
const buckets = { gradient_bucket: 1, parameter_bucket: 1 };
const plans = once((): readonly Plan[] => [
  planOf({ world: 8, tensor: 2, sequence: true, expert: 4, distributed_optimizer: true }),
  planOf({ world: 8, pipeline: 4, expert: 2 }),
  planOf({ world: 16, pipeline: 2, virtual_pipeline: 2, tensor: 2, sequence: true, context: 2, expert: 2 }),
  planOf({ world: 4, pipeline: 4, schedule: "zero_bubble" }, { moe: false }),
  planOf({ world: 8, expert: 4, distributed_optimizer: true, ...buckets, expert_overlap: "shared" }),
]);

const near = (a: number, b: number): void => expect(Math.abs(a - b)).toBeLessThan(1e-9 + 1e-9 * Math.abs(b));
const kernelSeconds = (block: TimedBlock): number =>
  block.instructions.reduce((sum, i) => sum + (i.instruction.kind === "compute" ? i.seconds : 0), 0);

test("the parts of every stage add up to the step", () => {
  for (const plan of plans()) {
    const e = estimate(plan, { profile: h100 });
    for (const { parts } of e.stages) {
      near(sumOfParts(parts), e.seconds);
      expect(parts.bubble).toBeGreaterThanOrEqual(-1e-12);
    }
  }
});

/** Busy seconds of each stream of a stage, messages apart: of these one may wait for its peer while it is under way. */
const busySeconds = ({ runs, step }: SimulatedStage): number[] => {
  const busy = new Map<string, number>();
  for (const block of [...runs.map((r) => r.block), step])
    for (const { stream, seconds, instruction } of block.instructions)
      if (instruction.kind === "compute" || instruction.kind === "collective") busy.set(stream, (busy.get(stream) ?? 0) + seconds);
  return [...busy.values()];
};

test("a step is never shorter than its busiest stream, nor than the chain of a microbatch through all stages", () => {
  for (const plan of plans()) {
    const { seconds, simulation } = estimate(plan, { profile: h100 });
    for (const stage of simulation.stages) for (const busy of busySeconds(stage)) expect(seconds).toBeGreaterThanOrEqual(busy - 1e-12);
    // each block of microbatch 0 waits for the one before, on whatever stage that is
    const chain = simulation.stages.flatMap(({ runs }) => runs.filter(({ run }) => run.microbatch === 0 && run.kind !== "weights"));
    expect(seconds).toBeGreaterThanOrEqual(chain.reduce((sum, { block }) => sum + kernelSeconds(block), 0));
  }
});

test("blocks of a stage run one after another, a stream does one thing at a time, and a receiver waits for its sender", () => {
  for (const plan of plans()) {
    for (const { runs } of estimate(plan, { profile: h100 }).simulation.stages) {
      let end = 0;
      for (const run of runs) {
        expect(run.start).toBeGreaterThanOrEqual(end);
        end = run.end;
        const last = new Map<string, number>();
        run.block.instructions.forEach(({ stream, instruction }, n) => {
          if (instruction.kind === "send" || instruction.kind === "recv") return;
          expect(run.times.times[2 * n]!).toBeGreaterThanOrEqual((last.get(stream) ?? 0) - 1e-12);
          last.set(stream, run.times.times[2 * n + 1]!);
        });
      }
    }
  }
});

/** A profile with faster or slower links and memory. */
const scaled = (p: DeviceProfile, host: number, network: number): DeviceProfile => ({
  ...p,
  links: {
    host: {
      ...p.links.host,
      bandwidth: p.links.host.bandwidth * host,
      tables: Object.fromEntries(
        Object.entries(p.links.host.tables).map(([how, rows]) => [
          how,
          rows.map((r) => ({ ...r, busbw: r.busbw.map(([size, rate]): [number, number] => [size, rate * host]) })),
        ]),
      ),
    },
    network: { ...p.links.network, bandwidth: p.links.network.bandwidth * network },
  },
});

test("more bandwidth is never slower, and neither is a faster kernel", () => {
  const factor = fc.double({ min: 0.25, max: 8, noNaN: true });
  fc.assert(
    fc.property(fc.nat(4), factor, factor, factor, (n, host, network, more) => {
      const plan = plans()[n]!;
      const time = (profile: DeviceProfile): number => estimate(plan, { profile }).seconds;
      const slow = scaled(h100, host, network);
      const better = 1 + more;
      expect(time(scaled(slow, better, 1))).toBeLessThanOrEqual(time(slow) * (1 + 1e-9));
      expect(time(scaled(slow, 1, better))).toBeLessThanOrEqual(time(slow) * (1 + 1e-9));
      const faster = { ...slow, kernels: { ...slow.kernels, clock: Math.min(2, slow.kernels.clock * better) } };
      expect(time(faster)).toBeLessThanOrEqual(time(slow) * (1 + 1e-9));
    }),
    { numRuns: 12 },
  );
});

/** Simulates a pipeline whose blocks have given lengths and whose communication and step are free. */
const bubbleOfTheory = (plan: Plan, lengths: Readonly<Record<"forward" | "backward" | "weights", number>>): number => {
  const profile = { ...h100, overlap: { ...h100.overlap, slowdown: 0 } };
  const options = { profile, imbalance: 1 };
  const timer = blockTimer(plan, options);
  const retimed = (block: TimedBlock): TimedBlock => {
    const first = block.instructions.find(({ instruction }) => instruction.kind === "compute");
    const length = block.kind === "step" || block.kind.startsWith("evaluation") ? 0 : lengths[block.kind as keyof typeof lengths];
    return { ...block, instructions: block.instructions.map((i) => ({ ...i, seconds: i === first ? length : 0 })) };
  };
  const { seconds, stages } = simulate(plan, options, (program, memory) => timer(program, memory).map(retimed));
  return stages.reduce((sum, { parts }) => sum + parts.bubble, 0) / (stages.length * seconds);
};

test("bubbles equal theory where communication is free: 1F1B, interleaved, zero-bubble", () => {
  const [p, m] = [4, 16];
  const whole = { forward: 1, backward: 2, weights: 0 };
  // two data ranks: half of the microbatches each
  expect(bubbleOfTheory(plans()[1]!, whole)).toBeCloseTo((p - 1) / (m / 2 + p - 1), 9);
  const interleaved = planOf({ world: 2, pipeline: 2, virtual_pipeline: 2 }, { moe: false });
  expect(bubbleOfTheory(interleaved, whole)).toBeCloseTo(1 / (2 * m + 1), 9);
  expect(bubbleOfTheory(plans()[3]!, { forward: 1, backward: 1, weights: 1 })).toBeCloseTo((p - 1) / (3 * m + p - 1), 9);
});

test("slower experts lengthen the step, and nothing else than rows of experts does", () => {
  const [mixture, , , dense] = plans().map(
    (plan) =>
      (imbalance: number): Estimate =>
        estimate(plan, { profile: h100, imbalance }),
  );
  expect(mixture!(2).seconds).toBeGreaterThan(mixture!(1).seconds);
  expect(dense!(2).seconds).toBe(dense!(1).seconds);
});

test("an asynchronous collective runs until an instruction waits for it by its id; other communication until a kernel touches its bytes", () => {
  const bytes = { reads: [], writes: [[0, 8] as const] };
  const kernel = { reads: [[0, 8] as const], writes: [] };
  const work = { ...bytes, axes: "dp", start: 0, end: 5, late: 0 };
  const inOrder = new StageClock(0, 0, [{ ...work, stream: "comm" }]);
  expect(inOrder.run(kernel, 1)).toMatchObject({ start: 5, end: 6, exposed: 5, axes: "dp" });
  const beside = new StageClock(0, 0, [{ ...work, stream: "gradients", id: "a" }]);
  expect(beside.run(kernel, 1)).toMatchObject({ start: 0, end: 1, exposed: 0 });
  expect(beside.readyAt(kernel, "comm")).toBe(1);
  expect(beside.await("a")).toMatchObject({ exposed: 4, axes: "dp" });
  expect(beside.await("a")).toMatchObject({ exposed: 0 });
  expect(beside.compute).toBe(5);
});

test("asynchronous collectives take as many times longer beside kernels as the profile says; those in order do not", () => {
  const busy = (plan: Plan, collective_factor: number, isAsync: boolean): number => {
    const { simulation } = estimate(plan, { profile: { ...h100, overlap: { ...h100.overlap, collective_factor } } });
    const [stage] = simulation.stages;
    const all = [...stage!.runs.map(({ block }) => block), stage!.step].flatMap(({ instructions }) => instructions);
    return all.reduce(
      (sum, { instruction: i, seconds }) => sum + (i.kind === "collective" && (i.stream !== undefined) === isAsync ? seconds : 0),
      0,
    );
  };
  const plan = plans()[4]!;
  near(busy(plan, 1.5, true), 1.5 * busy(plan, 1, true));
  near(busy(plan, 1.5, false), busy(plan, 1, false));
});

test("what overlap hides is no part of the step: gradients of buckets wait for less than those in order", () => {
  const waited = (plan: Plan): number => estimate(plan, { profile: slowLinks }).stages[0]!.parts.exposed.get("dp") ?? 0;
  const slowLinks = scaled(h100, 0.05, 0.05);
  const parallel = { world: 4, distributed_optimizer: true };
  const inOrder = waited(planOf(parallel, { moe: false }));
  expect(waited(planOf({ ...parallel, ...buckets }, { moe: false }))).toBeLessThan(0.9 * inOrder);
});
