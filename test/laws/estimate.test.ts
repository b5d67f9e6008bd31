/** Estimates: parts add up, nothing is faster than what it consists of, faster links never slow a step down, and bubbles are those of the literature. */
import fc from "fast-check";
import { expect, test } from "vitest";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import type { Instruction, Plan } from "../../schemas/plan.ts";
import { besideOf } from "../../src/analysis/estimate/besideLaw.ts";
import { type Estimate, estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { type SimulatedStage, simulate } from "../../src/analysis/estimate/simulate.ts";
import { StageClock } from "../../src/analysis/estimate/stageClock.ts";
import { blockTimer, type TimedBlock } from "../../src/analysis/estimate/timedBlocks.ts";
import { PartSums, sumOfParts } from "../../src/analysis/estimate/timeParts.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";
import { once } from "../support/tiers.ts";

const h100 = packageProfile("h100-80gb")!;

const planOf = (
  parallel: object,
  more: { readonly layers?: number; readonly batch?: number; readonly moe?: boolean; readonly model?: object } = {},
): Plan => {
  const { layers = 4, batch = 16, moe = true, model = {} } = more;
  return compile(
    jobOf({
      name: "estimated",
      model: {
        ...{ layers, hidden: 256, ffn: 512, heads: 8, vocab: 512, seq: 256 },
        ...(moe ? { moe: { experts: 8, top_k: 2, ffn: 256 } } : {}),
        ...model,
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
  planOf({ world: 8, pipeline: 2, virtual_pipeline: 2, expert: 4, expert_overlap: "interleave" }, { batch: 24 }),
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

test("of every class of communication, hidden and exposed seconds add up to its time, and the exposed ones to the waits of the stage", () => {
  const forward = planOf({ world: 8, expert: 4, distributed_optimizer: true, ...buckets, parameter_gather: "forward" });
  for (const plan of [...plans(), forward])
    for (const imbalance of [1, 1.5])
      for (const { classes, parts, communication } of estimate(plan, { profile: h100, imbalance }).stages) {
        expect(classes.length).toBeGreaterThan(0);
        for (const { total, exposed, under } of classes) {
          near(exposed + Object.values(under).reduce((a, b) => a + b, 0), total);
          for (const seconds of [exposed, ...Object.values(under)]) expect(seconds).toBeGreaterThanOrEqual(0);
        }
        const sum = (seconds: Iterable<number>): number => [...seconds].reduce((a, b) => a + b, 0);
        near(sum(classes.map(({ exposed }) => exposed)), sum(parts.exposed.values()));
        near(sum(communication.map(({ total }) => total)), sum(classes.map(({ total }) => total)));
      }
});

test("buckets of gradients are hidden under what backward computes, those of parameters under the optimizer", () => {
  const [stage] = estimate(plans()[4]!, { profile: h100 }).stages;
  const under = (stream: string): string[] =>
    stage!.classes
      .filter((c) => c.stream === stream)
      .flatMap((c) => Object.keys(c.under).filter((activity) => !activity.startsWith("waits")));
  const [program] = plans()[4]!.programs;
  const opsOf = (block: readonly Instruction[]): string[] => block.flatMap((i) => (i.kind === "compute" ? [i.op] : []));
  const ofStep = opsOf(program!.step);
  expect(under("gradients").some((op) => op.includes("wgrad"))).toBe(true);
  expect([...opsOf(program!.chunks[0]!.backward), ...ofStep]).toEqual(expect.arrayContaining(under("gradients")));
  expect(under("parameters").length).toBeGreaterThan(0);
  expect(ofStep).toEqual(expect.arrayContaining(under("parameters")));
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

test("pairs wait for experts less than shared experts alone let them, by the same kernels", () => {
  // kernels long enough to hide an exchange
  const model = { hidden: 2048, seq: 4096, heads: 16, moe: { experts: 8, top_k: 2, ffn: 2048, rows_bound: 1 } };
  const [none, shared, interleave] = ["none", "shared", "interleave"].map((expert_overlap) =>
    estimate(planOf({ world: 8, expert: 8, expert_overlap }, { batch: 64, model }), { profile: h100 }),
  );
  const waits = (e: Estimate): number => e.stages[0]!.parts.exposed.get("ep") ?? 0;
  expect(waits(shared!)).toBeLessThan(waits(none!));
  expect(waits(interleave!)).toBeLessThan(0.5 * waits(shared!));
  expect(interleave!.seconds).toBeLessThan(shared!.seconds);
  const { runs } = interleave!.simulation.stages[0]!;
  expect(runs.filter(({ run }) => run.paired)).toHaveLength(7);
  // both blocks of a pair have the times of all their instructions, on one clock
  for (const { block, times } of runs) expect(times.times).toHaveLength(2 * block.instructions.length);
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
    fc.property(fc.nat(5), factor, factor, factor, (n, host, network, more) => {
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
  const bytes = { touch: { reads: [], writes: [[0, 8] as const] } };
  const gemm = plans()[0]!.programs[0]!.step.find((i) => i.kind === "compute")!;
  const kernel = {
    instruction: gemm,
    seconds: 1,
    source: "law" as const,
    stream: "compute",
    touch: { reads: [[0, 8] as const], writes: [] },
  };
  const communication = { name: "reduce_scatter", axes: "dp" };
  const work = { ...bytes, communication, axes: "dp", start: 0, end: 5, late: 0 };
  const clockWith = (more: object) => {
    const parts = new PartSums();
    return { parts, clock: new StageClock(parts, 0, [{ ...work, stream: "comm", ...more }]) };
  };
  const inOrder = clockWith({});
  expect(inOrder.clock.run(kernel)).toEqual([5, 6]);
  expect(inOrder.parts.exposed.get("dp")).toBe(5);
  expect(inOrder.parts.hiddenUnder.size).toBe(0);
  const beside = clockWith({ stream: "gradients", id: "a" });
  expect(beside.clock.run(kernel)).toEqual([0, 1]);
  expect(beside.clock.readyAt(kernel, "comm")).toBe(1);
  for (let again = 0; again < 2; again++) beside.clock.await("a");
  expect(beside.clock.compute).toBe(5);
  expect(beside.parts.exposedBy.get(communication)).toBe(4);
  expect([...beside.parts.hiddenUnder.get(communication)!]).toEqual([[gemm.op, 1]]);
});

test("what waits in a queue is charged while it runs: each collective of a stream for its own time, and other stages for what they are late", () => {
  const [first, second, world] = ["all_gather", "reduce_scatter", "all_reduce"].map((name) => ({ name, axes: name }));
  const parts = new PartSums();
  const none = { touch: { reads: [], writes: [] } };
  const clock = new StageClock(parts, 0, [
    { ...none, communication: first!, axes: "a", stream: "s", id: "1", start: 0, end: 2, late: 0 },
    { ...none, communication: second!, axes: "b", stream: "s", id: "2", start: 2, end: 5, late: 0 },
    { ...none, communication: world!, axes: "c", stream: "t", start: 4, end: 9, late: 3 },
  ]);
  clock.await("2");
  expect([...parts.exposedBy]).toEqual([
    [first, 2],
    [second, 3],
  ]);
  clock.join();
  expect([parts.exposedBy.get(world!), parts.bubble, clock.compute]).toEqual([2, 2, 9]);
  expect(parts.hiddenUnder.size).toBe(0);
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

test("a limit of multiprocessors lengthens collectives as measured, between measurements monotonously; without one, and in order, nothing changes", () => {
  const h200 = packageProfile("h200-141gb")!;
  const { overlap } = h200;
  for (const { multiprocessors, ...measured } of overlap.limits) expect(besideOf(overlap, multiprocessors)).toEqual(measured);
  expect(besideOf(overlap, "none")).toEqual({ slowdown: overlap.slowdown, collective_factor: overlap.collective_factor });
  expect(besideOf(overlap, 64)).toEqual(besideOf(overlap, "none"));
  near(besideOf(overlap, 4).collective_factor, 2 * besideOf(overlap, 8).collective_factor);
  const factors = Array.from({ length: 132 }, (_, n) => besideOf(overlap, n + 1).collective_factor);
  for (const [n, factor] of factors.entries()) expect(factor).toBeLessThanOrEqual(factors[n - 1] ?? Number.POSITIVE_INFINITY);
  expect(besideOf(h100.overlap, 8)).toEqual(besideOf(h100.overlap, "none"));

  const limited = (communication_sms: number | "none", more: object): Estimate =>
    estimate(planOf({ world: 8, distributed_optimizer: true, ...more, communication_sms }), { profile: h200 });
  const time = ({ stages }: Estimate, isAsync: boolean): number =>
    stages[0]!.classes.reduce((sum, { stream, total }) => sum + ((stream !== undefined) === isAsync ? total : 0), 0);
  const [none, eight] = [limited("none", buckets), limited(8, buckets)];
  near(time(eight, true) / time(none, true), besideOf(overlap, 8).collective_factor / overlap.collective_factor);
  near(time(eight, false), time(none, false));
});
