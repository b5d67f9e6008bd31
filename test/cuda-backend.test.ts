/**
 * The CUDA backend and NCCL's collectives before stand-ins for both libraries: no GPU is asked. What the device would do
 * at once is done late and in random order here, so numbers agree only if streams, events and graphs order what must be.
 */
import { execFileSync } from "node:child_process";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import type { Fleet, HostData } from "../runtime/backend.ts";
import { openCpu } from "../runtime/cpu.ts";
import type { CudaFleet } from "../runtime/cuda/backend.ts";
import { cubinFile } from "../runtime/cuda/kernels.ts";
import { elementsOf } from "../schemas/layout.ts";
import type { Buffer, Instruction, Kernel, Move, Plan } from "../schemas/plan.ts";
import { compile } from "../src/compile.ts";
import { asCuda, bytesAt, imagesOf, noCompiler, type StandIn, standIn } from "./cudaStandIn.ts";
import { bufferIn, type Hand, handPlan } from "./handPlan.ts";
import { random } from "./opCases.ts";
import { jobOf } from "./support.ts";

let cuda: StandIn;
beforeAll(async () => {
  if (!noCompiler) cuda = await standIn();
});
afterAll(() => vi.unstubAllEnvs());

type Settings = Partial<Parameters<StandIn["openCuda"]>[1]>;

/** All ranks of a plan, each a fleet of its own. */
async function openAll(plan: Plan, settings: Settings = {}, from: StandIn = cuda): Promise<CudaFleet[]> {
  let id: Uint8Array | undefined;
  const share = async (_: string, members: readonly number[], make: () => Uint8Array) => {
    expect(members.length).toBe(plan.mesh.world);
    return (id ??= make());
  };
  const ranks = Array.from({ length: plan.mesh.world }, (_, r) => r);
  const signal = AbortSignal.timeout(20_000);
  return Promise.all(ranks.map((rank) => from.openCuda(plan, { rank, device: rank, files: imagesOf(plan), share, signal, ...settings })));
}
async function closeAll(fleets: readonly Fleet[]): Promise<void> {
  for (const f of fleets) await f.close();
}

/** One step of all ranks: as runtime/execute.ts walks a plan. */
async function step(fleets: readonly Fleet[], plan: Plan, feed: (b: Buffer, name: string, m: number) => HostData): Promise<boolean[]> {
  const replayed = fleets.map((f) => (f as Partial<CudaFleet>).beginStep?.() ?? false);
  const walks = fleets.flatMap((f) => f.ranks.map((r) => walk(f, plan, r, feed)));
  for (let left = walks; left.length; ) left = left.filter((w) => !w.next().done);
  await Promise.all(fleets.map((f) => f.finish()));
  if (cuda.complaint()) throw cuda.complaint();
  return replayed;
}
function* walk(fleet: Fleet, plan: Plan, r: number, feed: (b: Buffer, name: string, m: number) => HostData): Generator<undefined> {
  const p = plan.programs[Math.floor(r / plan.mesh.per_stage)]!;
  const backend = fleet.backend(r);
  const buffers = new Map(p.buffers.map((b) => [b.id, b]));
  const read = (i: Instruction) =>
    i.kind === "compute" ? Object.values(i.reads) : i.kind === "move" ? [i.from] : i.kind === "send" ? [i.buffer] : [];
  function* block(
    instructions: readonly Instruction[],
    kinds: readonly string[],
    tag: string,
    slot: number,
    m: number,
  ): Generator<undefined> {
    const used = new Set(instructions.flatMap(read));
    for (const [name, id] of Object.entries(p.inputs)) {
      const b = buffers.get(id)!;
      if (used.has(id) && kinds.includes(b.kind)) backend.write(b, slot, feed(b, name, m));
    }
    for (const i of instructions) {
      if (i.kind === "compute") backend.compute(i, slot);
      else if (i.kind === "move") while (!fleet.comm.move(r, i, { tag, slot })) yield;
      else if (i.kind === "send") fleet.comm.send(r, i, { tag, slot });
      else while (!fleet.comm.recv(r, i, { tag, slot })) yield;
    }
  }
  backend.zeroGradients();
  for (const tag of p.order) {
    const m = Number(tag.slice(1));
    const forward = tag.startsWith("F");
    yield* block(forward ? p.forward : p.backward, forward ? ["workspace", "activation"] : ["workspace"], tag, m % p.slots, m);
  }
  yield* block(p.step, ["optimizer"], "step", 0, 0);
}

const model = { layers: 2, hidden: 16, ffn: 24, heads: 4, kv_heads: 2, head_dim: 4, vocab: 256, seq: 8 };
const moe = { experts: 4, top_k: 2, ffn: 8, router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 } };
const planOf = (parallel: object, over: object = {}, train: object = {}): Plan =>
  compile(
    jobOf({
      name: "stand-in",
      model: { ...model, ...over },
      parallel,
      train: { micro_batch: 1, global_batch: 8, steps: 4, precision: "fp32", init_std: 0.2, optimizer: { lr: 1e-2 }, ...train },
      data: { path: "corpus.txt" },
    }),
  ).plan;

/** What a rank holds after four steps: its parameters, gradients and optimizer state; and of each step, its metrics. */
async function train(fleets: readonly Fleet[], plan: Plan, steps = 4) {
  for (const f of fleets)
    for (const r of f.ranks) {
      const p = plan.programs[Math.floor(r / plan.mesh.per_stage)]!;
      for (const q of p.parameters)
        for (const id of new Set([q.buffer, q.master])) {
          const b = p.buffers.find((x) => x.id === id)!;
          const next = random(q.name.length * 31 + b.shape.length);
          f.backend(r).write(
            b,
            0,
            Float32Array.from({ length: elementsOf(b.shape) }, () => next() * 0.3 + (q.init.type === "ones" ? 1 : 0)),
          );
        }
    }
  const replayed: boolean[][] = [];
  const metrics: number[][] = [];
  const each = async (pick: (p: Plan["programs"][number]) => readonly string[]) => {
    const found: HostData[] = [];
    for (const f of fleets)
      for (const r of f.ranks) {
        const p = plan.programs[Math.floor(r / plan.mesh.per_stage)]!;
        for (const id of pick(p)) found.push(await f.backend(r).read(p.buffers.find((b) => b.id === id)!, 0));
      }
    return found;
  };
  for (let n = 1; n <= steps; n++) {
    const next = random(n);
    const whole = Array.from({ length: 64 }, () => Int32Array.from({ length: 64 }, () => Math.floor((next() + 1) * 127.9)));
    const feed = (b: Buffer, name: string, m: number): HostData => {
      if (name === "ids" || name === "labels") return whole[2 * m + Number(name === "labels")]!.slice(0, elementsOf(b.shape));
      return Float32Array.of(name === "one" ? 1 : name === "lr" ? 0.01 / n : n);
    };
    replayed.push(await step(fleets, plan, feed));
    metrics.push((await each((p) => Object.values(p.metrics).flat())).map((m) => m[0]!));
  }
  const state = await each((p) => p.parameters.flatMap((q) => [...new Set([q.buffer, q.master, q.gradient])]));
  return { metrics, state, replayed };
}

async function expectSame(parallel: object, over: object = {}, how: object = {}, settings: Settings = {}) {
  const reference = planOf(parallel, over, how);
  const cpu = openCpu(reference);
  const want = await train([cpu], reference);
  const { plan, kernels } = asCuda(reference);
  cuda.serve(kernels);
  const fleets = await openAll(plan, settings);
  const got = await train(fleets, plan);
  await closeAll(fleets);
  expect(want.metrics.flat().every(Number.isFinite)).toBe(true);
  expect(new Set(want.metrics.map((m) => m[0])).size).toBe(4);
  expect(got.metrics).toEqual(want.metrics);
  for (const [n, values] of want.state.entries()) expect(got.state[n], `piece ${n}`).toEqual(values);
  return got;
}

describe.skipIf(noCompiler)(`plans before stand-ins for the driver and NCCL${noCompiler}`, () => {
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
    "bounded rows": [{ world: 4, expert: 4 }, { moe: { ...moe, experts: 8, rows_bound: 3 } }],
  } as const satisfies Record<string, readonly [object, object, object?]>;
  test.each(Object.entries(meshes))(
    "%s: four steps are the CPU's, bit by bit; from the third on they are a graph",
    async (_, [parallel, over, how]) => {
      const { replayed } = await expectSame(parallel, over, how);
      expect(replayed.map((ranks) => new Set(ranks))).toEqual([false, false, true, true].map((r) => new Set([r])));
    },
  );
  test("without a graph, in other orders of the device", async () => {
    for (const seed of [1, 2, 3]) {
      cuda.seed(seed);
      const { replayed } = await expectSame({ world: 4, pipeline: 2, tensor: 2, sequence: true }, { moe }, {}, { graph: false });
      expect(replayed.flat()).not.toContain(true);
    }
  });
});
