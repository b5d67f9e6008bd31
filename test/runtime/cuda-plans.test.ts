/**
 * Plans on the CUDA backend, before stand-ins for the driver and NCCL: no GPU is used. The stand-ins run
 * work late and in random order, so numbers equal the CPU's only if streams, events and graphs order all dependent work.
 */

import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { openCpu } from "../../runtime/cpu/backend.ts";
import type { Instruction } from "../../schemas/plan.ts";
import { blockOf } from "../../schemas/program.ts";
import { moe, planOf, type Ranks, type Settings, standInRanks } from "../support/cudaRanks.ts";
import { asCuda, noCompiler } from "../support/cudaStandIn.ts";
import { sameNumbers } from "../support/job.ts";
import { closeAll, train } from "../support/steps.ts";
import { byTier, draws, full } from "../support/tiers.ts";

/** The kernel that an instruction runs; empty for communication. */
const kernelOf = (i: Instruction, first: boolean): string =>
  i.kind === "compute" ? ((first ? i.first_kernel : undefined) ?? i.kernel) : "";

let cuda: Ranks;
beforeAll(async () => {
  if (!noCompiler) cuda = await standInRanks();
});
afterAll(() => vi.unstubAllEnvs());

async function expectSame(parallel: object, over: object = {}, how: object = {}, settings: Settings = {}, steps = 4) {
  const reference = planOf(parallel, over, how);
  const cpu = openCpu(reference);
  const want = await train([cpu], reference, undefined, steps);
  const { plan, kernels } = asCuda(reference);
  cuda.serve(kernels);
  const fleets = await cuda.openAll(plan, settings);
  const got = await train(fleets, plan, cuda.step, steps);
  await closeAll(fleets);
  expect(want.metrics.every((m, n) => want.skipped[n] || m.every(Number.isFinite))).toBe(true);
  expect(got.skipped).toEqual(want.skipped);
  const kept = want.metrics.filter((_, n) => !want.skipped[n]);
  expect(new Set(kept.map((m) => m[0])).size).toBe(kept.length);
  expect(got.metrics).toEqual(want.metrics);
  expect(got.counts).toEqual(want.counts);
  for (const [n, values] of want.state.entries()) expect(sameNumbers(got.state[n]!, values), `piece ${n}`).toBe(true);
  return got;
}

describe.skipIf(noCompiler)(`plans with stand-ins for the driver and NCCL${noCompiler}`, () => {
  const meshes = {
    "one rank": [{ world: 1 }, {}],
    "one rank with experts, bf16": [{ world: 1 }, { moe }, { precision: "bf16" }],
    "data parallel": [{ world: 4, distributed_optimizer: true }, {}],
    "tensor and sequence": [{ world: 4, tensor: 2, sequence: true, distributed_optimizer: true }, {}],
    "a pipeline of four, more microbatches than stages": [{ world: 4, pipeline: 4 }, { layers: 4 }],
    "a pipeline with tied embeddings": [{ world: 4, pipeline: 2 }, { tie_embeddings: true }],
    "experts over data, in a pipeline, bf16": [
      { world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 2 },
      { moe },
      { precision: "bf16" },
    ],
    "latent attention and a bias, bf16": [
      { world: 4, tensor: 2, sequence: true },
      { kv_heads: 4, head_dim: 6, mla: { q_rank: 8, kv_rank: 8, nope_dim: 4, rope_dim: 2, v_dim: 3 }, out_bias: true },
      { precision: "bf16" },
    ],
    "what a router keeps from one microbatch to the next, and from one step to the next": [
      { world: 4, tensor: 2, sequence: true, expert: 2, distributed_optimizer: true },
      {
        moe: {
          ...{ ...moe, capacity: { factor: 1 }, shared: { ffn: 8, gate: true }, latent: 4 },
          router: {
            score: "sigmoid",
            expert_bias: true,
            bias_rate: 0.05,
            balance: ["seq_aux_loss", "global_aux_loss"],
            aux_coeff: [0.05, 0.05],
          },
        },
      },
    ],
    "rounds of Sinkhorn's method": [
      { world: 4, pipeline: 2, expert: 2 },
      { moe: { ...moe, router: { balance: "sinkhorn", normalize_top_k: false, z_coeff: 0.01 } } },
    ],
    "keys that go around a ring, bf16": [{ world: 8, context: 4, tensor: 2, sequence: true }, { moe, seq: 32 }, { precision: "bf16" }],
    "keys that are gathered": [{ world: 4, context: 2, context_method: "all_gather", pipeline: 2, virtual_pipeline: 2 }, { layers: 4 }],
    "several messages in flight, and parts without a layer": [
      { world: 2, pipeline: 2, layout: "E||tttt|L" },
      { layers: 4 },
      { global_batch: 5 },
    ],
    "a zero-bubble schedule": [{ world: 4, pipeline: 4, schedule: "zero_bubble" }, { layers: 4 }],
    "grids that do not nest, bf16": [
      { world: 6, tensor: 2, sequence: true, expert: 3, distributed_optimizer: true },
      { moe: { ...moe, experts: 6 } },
      { precision: "bf16", global_batch: 12 },
    ],
    "buckets of gradients and parameters, and shared experts, beside exchanges on streams of their own, bf16": [
      {
        world: 8,
        tensor: 2,
        sequence: true,
        expert: 4,
        distributed_optimizer: true,
        gradient_bucket: 0.004,
        parameter_bucket: 0.002,
        parameter_gather: "forward",
        expert_overlap: "shared",
        communication_sms: 8,
      },
      { moe: { ...moe, shared: { ffn: 8, gate: true } } },
      { precision: "bf16" },
    ],
    "products in parts, and gradients of weights, beside exchanges between tensor ranks, bf16": [
      { world: 4, tensor: 2, sequence: true, distributed_optimizer: true, tensor_overlap: 2 },
      { seq: 64, hidden: 64 },
      { precision: "bf16" },
    ],
    "pairs of microbatches, with buckets, bf16": [
      { world: 4, expert: 4, distributed_optimizer: true, gradient_bucket: 0.004, expert_overlap: "interleave" },
      { moe },
      { precision: "bf16" },
    ],
    "pairs of chunks": [
      { world: 8, pipeline: 2, virtual_pipeline: 2, expert: 4, expert_overlap: "interleave" },
      { moe, layers: 4 },
      { global_batch: 12 },
    ],
    "buckets of gradients in the gaps of a pipeline": [
      { world: 4, pipeline: 2, schedule: "zero_bubble", gradient_bucket: 0.001 },
      { tie_embeddings: true },
    ],
    "tokens that are sent once to each rank, bounded rows, bf16": [
      { world: 8, tensor: 2, sequence: true, expert: 4, expert_tensor: 2, expert_overlap: "shared" },
      { moe: { ...moe, experts: 8, rows_bound: 4, dispatch: "once", shared: { ffn: 8, gate: true } } },
      { precision: "bf16" },
    ],
    "tokens that are sent once to each node, and in it once to each rank, in pairs, bf16": [
      { world: 4, expert: 4, expert_overlap: "interleave", gpus_per_node: 2 },
      { moe: { ...moe, experts: 8, top_k: 3, rows_bound: 4, dispatch: "once_per_node" } },
      { precision: "bf16" },
    ],
    "bounded rows": [{ world: 4, expert: 4 }, { moe: { ...moe, experts: 8, rows_bound: 3 } }],
  } as const satisfies Record<string, readonly [object, object, object?]>;
  const inFast = [
    "a pipeline with tied embeddings",
    "pairs of microbatches, with buckets, bf16",
    "buckets of gradients and parameters, and shared experts, beside exchanges on streams of their own, bf16",
  ];
  for (const { options, rows } of byTier(Object.entries(meshes), ([name]) => inFast.includes(name)))
    test.each(rows)(
      "%s: four steps are the CPU's, bit by bit; from the third on they are a graph",
      options,
      async (_, [parallel, over, how]) => {
        const before = cuda.limited();
        const { replayed } = await expectSame(parallel, over, how);
        expect(cuda.limited() > before).toBe("communication_sms" in parallel);
        expect(replayed.map((ranks) => new Set(ranks))).toEqual([false, false, true, true].map((r) => new Set([r])));
      },
    );
  const falling = { initial: 2 ** 30, hysteresis: 1, backoff: 2 ** -14 };
  const rising = { weight_decay_schedule: "linear", weight_decay_start: 0, weight_decay_end: 0.5 };
  const overflowing = [
    ["sgd, one rank", { world: 1 }, {}, { type: "sgd" }],
    [
      "adam, a weight decay that rises, stages and shares",
      { world: 8, pipeline: 2, distributed_optimizer: true },
      {},
      { type: "adam", ...rising },
    ],
    [
      "sgd, a weight decay that rises, experts",
      { world: 4, tensor: 2, sequence: true, expert: 2 },
      { moe },
      { type: "sgd", momentum: 0, ...rising },
    ],
  ] as const;
  for (const { options, rows } of byTier(overflowing, (_, i) => i === 0))
    test.each(rows)(
      "fp16, %s: steps that overflow are left out, replayed ones too; all are the CPU's, bit by bit",
      options,
      async (_, parallel, over, optimizer) => {
        const how = { precision: "fp16", loss_scale: falling, optimizer: { lr: 1e-2, ...optimizer } };
        const { replayed, skipped } = await expectSame(parallel, over, how);
        expect(skipped).toEqual([true, false, false, false]);
        expect(replayed.map((ranks) => ranks[0])).toEqual([false, false, true, true]);
        // from a scale that no step of the first graph has seen
        const late = await expectSame(
          parallel,
          over,
          { ...how, loss_scale: { ...falling, initial: 2 ** 15, growth: 2 ** 14, growth_interval: 2 } },
          {},
          6,
        );
        expect(late.skipped).toEqual([false, false, true, false, false, true]);
      },
    );
  const growing = [
    ["one rank", { world: 1 }, {}, {}],
    [
      "stages in chunks, shares, tied embeddings",
      { world: 4, pipeline: 2, virtual_pipeline: 2, distributed_optimizer: true },
      { layers: 4, tie_embeddings: true },
      {},
    ],
    [
      "gradients of weights in the gaps, experts, fp16",
      { world: 4, pipeline: 2, schedule: "zero_bubble", expert: 2 },
      { moe },
      { precision: "fp16", loss_scale: 256 },
    ],
  ] as const;
  for (const { options, rows } of byTier(growing, (_, i) => i === 0))
    test.each(rows)(
      "a batch that grows, %s: each number of microbatches has a graph; the steps are the CPU's, bit by bit",
      options,
      async (_, parallel, over, how) => {
        const ramp = { global_batch: 8, batch_rampup: { start: 4, increment: 4, samples: 12 }, ...how };
        const { replayed } = await expectSame(parallel, over, ramp, {}, 7);
        expect(replayed.map((ranks) => new Set(ranks))).toEqual([false, false, true, false, false, true, true].map((r) => new Set([r])));
      },
    );
  test("without a graph, in other orders of the device", full, async () => {
    for (const seed of [1, 2, 3].slice(0, draws(1, 3))) {
      cuda.seed(seed);
      const { replayed } = await expectSame({ world: 4, pipeline: 2, tensor: 2, sequence: true }, { moe }, {}, { graph: false });
      expect(replayed.flat()).not.toContain(true);
    }
  });
});

test.skipIf(noCompiler)(`a profile has every instruction, its stream and its times, with stand-ins${noCompiler}`, async () => {
  const reference = planOf({ world: 4, pipeline: 2, distributed_optimizer: true });
  const { plan, kernels } = asCuda(reference);
  cuda.serve(kernels);
  const fleets = await cuda.openAll(plan, { profile: true });
  const { replayed } = await train(fleets, plan, cuda.step);
  expect(replayed.flat()).not.toContain(true);
  for (const [r, f] of fleets.entries()) {
    const p = plan.programs[Math.floor(r / 2)]!;
    const all = f.profile();
    const inOrder = [
      ...p.order.flatMap((run) => blockOf(p, run).map((i) => ({ id: i.id, kernel: kernelOf(i, run.microbatch === 0) }))),
      ...p.step.map((i) => ({ id: i.id, kernel: kernelOf(i, false) })),
    ];
    expect(all.map(({ id }) => id)).toEqual(inOrder.map(({ id }) => id));
    expect(new Set(all.map(({ stream }) => stream))).toEqual(
      new Set(["compute", "comm", r < 2 ? "send 1 forward" : "send 0 backward", r < 2 ? "recv 1 backward" : "recv 0 forward"]),
    );
    for (const [n, t] of all.entries()) {
      expect(t.end_us).toBeGreaterThan(t.begin_us);
      expect([t.rank, t.kernel]).toEqual([r, inOrder[n]?.kernel]);
    }
  }
  await closeAll(fleets);
});
