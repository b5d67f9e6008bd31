/**
 * The CUDA backend and NCCL's collectives before stand-ins for both libraries: no GPU is asked. What the device would do
 * at once is done late and in random order here, so numbers agree only if streams, events and graphs order what must be.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import type { Fleet, HostData } from "../runtime/backend.ts";
import { openCpu } from "../runtime/cpu.ts";
import type { CudaFleet } from "../runtime/cuda/backend.ts";
import { elementsOf } from "../schemas/layout.ts";
import type { Arg, Buffer, Compute, Dtype, How, Instruction, Kernel, Move, Plan } from "../schemas/plan.ts";
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

/** Random values of a type, small enough that sums of a few are exact. */
const valuesOf = (dtype: Dtype, count: number, seed: number): HostData => {
  const next = random(seed);
  const all = Array.from({ length: count }, () => Math.round(next() * 100));
  return dtype === "i32" ? Int32Array.from(all) : Float32Array.from(all);
};
const moveOf = (how: How, from: string, to: string, more: Partial<Move> = {}): Move => ({
  ...{ kind: "move", id: `${to}.${how}`, how, name: how, axes: "dp", factors: [0], from, to, bytes: 0 },
  why: { op: "", because: "", path: "" },
  ...more,
});
const at = { tag: "F0", slot: 0 };

const launchOf = (id: string): Kernel => ({
  ...{ id, op: id, dtypes: "f32", dims: {}, uses: 1, scratch: 0 },
  source: { file: `${id}.cu`, sha256: "0".repeat(64) },
  launches: [{ entry: id, grid: [1, 1, 1], threads: 1, shared: 0, args: ["y", "start(S)"] }],
});
const runs = (kernel: string, y: string): Compute => ({
  ...{ kind: "compute", id: `${kernel} ${y}`, op: kernel, kernel, reads: {}, writes: { y }, dims: { S: [8, [0]] }, attrs: {} },
});
/** put writes the rank's start, spoil what no one may see. */
const putAndSpoil = {
  put: (params: DataView) => new Float32Array(bytesAt(params.getBigUint64(0, true), 4)).fill(100 + params.getInt32(8, true)),
  spoil: (params: DataView) => new Float32Array(bytesAt(params.getBigUint64(0, true), 4)).fill(-1e6),
};
const small = { x: { shape: [1] }, y: { shape: [1] }, z: { shape: [1] } };

describe.skipIf(noCompiler)(`collectives before stand-ins${noCompiler}`, () => {
  const g = 4;
  const n = 5;
  type Case = { readonly from: number; readonly to: number; readonly want: (held: readonly HostData[], r: number) => number[] };
  const sum = (held: readonly HostData[], i: number): number => held.reduce((s, h) => s + h[i]!, 0);
  const cases: Record<How, Case> = {
    all_gather: { from: n, to: g * n, want: (held) => held.flatMap((h) => [...h]) },
    reduce_scatter: { from: g * n, to: n, want: (held, r) => Array.from({ length: n }, (_, i) => sum(held, r * n + i)) },
    all_to_all: { from: g * n, to: g * n, want: (held, r) => held.flatMap((h) => [...h.slice(r * n, (r + 1) * n)]) },
    all_reduce: { from: n, to: n, want: (held) => Array.from({ length: n }, (_, i) => sum(held, i)) },
    all_reduce_max: { from: n, to: n, want: (held) => Array.from({ length: n }, (_, i) => Math.max(...held.map((h) => h[i]!))) },
  };
  const all = Object.keys(cases) as How[];

  async function expectMoved(how: How, dtype: Dtype, within: boolean, from: StandIn): Promise<void> {
    const { from: a, to: b, want } = cases[how];
    const [x, y] = [
      { dtype, shape: [a] },
      { dtype, shape: [b] },
    ];
    // the larger of two that share their first byte is the one that has a place
    const buffers: Hand["buffers"] = !within ? { x, y } : a >= b ? { x, y: { ...y, within: "x" } } : { y, x: { ...x, within: "y" } };
    const plan = handPlan({ world: g, target: "cuda:sm_90a", buffers, forward: [moveOf(how, "x", "y")] });
    const fleets = await openAll(plan, {}, from);
    const held = fleets.map((_, r) => valuesOf(dtype, a, r));
    for (const [r, f] of fleets.entries()) f.backend(r).write(bufferIn(plan, "x"), 0, held[r]!);
    for (const [r, f] of fleets.entries()) expect(f.comm.move(r, plan.programs[0]!.forward[0] as Move, at)).toBe(true);
    await Promise.all(fleets.map((f) => f.finish()));
    for (const [r, f] of fleets.entries())
      expect([...(await f.backend(r).read(bufferIn(plan, "y"), 0))], `rank ${r}`).toEqual(want(held, r));
    await closeAll(fleets);
  }
  test.each(all)("%s, in each type, apart and in the source's own place", async (how) => {
    for (const dtype of ["f32", "bf16", "i32"] as const) for (const within of [false, true]) await expectMoved(how, dtype, within, cuda);
  });
  test("an NCCL without all-to-all exchanges by a group of sends and receives", async () => {
    const old = await standIn({ oldNccl: true });
    for (const within of [false, true]) await expectMoved("all_to_all", "f32", within, old);
  });

  test("groups are those that share all digits but the factors'", async () => {
    const hand = handPlan({
      world: 8,
      target: "cuda:sm_90a",
      buffers: { x: { shape: [1] }, y: { shape: [1] }, z: { shape: [1] }, w: { shape: [1] } },
    });
    const factors = [
      { stride: 1, size: 2 },
      { stride: 2, size: 1 },
      { stride: 2, size: 4 },
    ];
    const forward = [
      moveOf("all_reduce", "x", "y", { factors: [2, 1] }),
      moveOf("all_reduce", "x", "z", { world: true, factors: [0, 2] }),
      moveOf("all_reduce", "x", "w", { factors: [1] }),
    ];
    const plan: Plan = { ...hand, mesh: { ...hand.mesh, factors }, programs: hand.programs.map((p) => ({ ...p, forward })) };
    const fleets = await openAll(plan);
    for (const [r, f] of fleets.entries()) {
      f.backend(r).write(bufferIn(plan, "x"), 0, Float32Array.of(2 ** r));
      for (const i of forward) f.comm.move(r, i, at);
    }
    const read = (r: number, id: string) => fleets[r]!.backend(r).read(bufferIn(plan, id), 0);
    for (let r = 0; r < 8; r++)
      expect([(await read(r, "y"))[0], (await read(r, "z"))[0], (await read(r, "w"))[0]]).toEqual([
        r % 2 ? 0b10101010 : 0b1010101,
        255,
        2 ** r,
      ]);
    await closeAll(fleets);
  });

  test.each([true, false])("kernels beside a collective wait for it where they touch its bytes; graph: %s", async (graph) => {
    cuda.serve(putAndSpoil);
    const forward = [
      runs("put", "x"),
      runs("spoil", "y"),
      moveOf("all_reduce", "x", "y"),
      runs("put", "z"),
      runs("spoil", "x"),
      moveOf("all_reduce", "y", "z"),
    ];
    const plan = handPlan({ world: 2, target: "cuda:sm_90a", buffers: small, kernels: ["put", "spoil"].map(launchOf), forward });
    for (let seed = 0; seed < 20; seed++) {
      cuda.seed(seed);
      const fleets = await openAll(plan, { graph });
      for (let n = 1; n <= 4; n++) {
        await step(fleets, plan, () => Float32Array.of());
        for (const [r, f] of fleets.entries())
          for (const [id, want] of Object.entries({ x: -1e6, y: 204, z: 408 }))
            expect([id, (await f.backend(r).read(bufferIn(plan, id), 0))[0]]).toEqual([id, want]);
      }
      await closeAll(fleets);
    }
  });

  test.each([true, false])(
    "what is received goes into a collective, and what is sent may be overwritten at once; graph: %s",
    async (graph) => {
      cuda.serve(putAndSpoil);
      const transfer = (kind: "send" | "recv", peer: number): Instruction => ({
        kind,
        id: `t.${kind}`,
        buffer: "x",
        tag: "t",
        peer,
        bytes: 4,
        why: { op: "", because: "", path: "" },
      });
      const hand = handPlan({ world: 4, stages: 2, target: "cuda:sm_90a", buffers: small, kernels: ["put", "spoil"].map(launchOf) });
      const forward = [
        [runs("put", "x"), transfer("send", 1), runs("spoil", "x"), moveOf("all_reduce", "x", "y")],
        [runs("spoil", "x"), transfer("recv", 0), moveOf("all_reduce", "x", "y"), runs("spoil", "x")],
      ];
      const order = ["F0", "F1", "F2"];
      const plan: Plan = { ...hand, programs: hand.programs.map((p, s) => ({ ...p, order, forward: forward[s]! })) };
      for (let seed = 0; seed < 20; seed++) {
        cuda.seed(seed);
        const fleets = await openAll(plan, { graph });
        for (let n = 1; n <= 3; n++) {
          await step(fleets, plan, () => Float32Array.of());
          for (const [r, f] of fleets.entries()) expect((await f.backend(r).read(bufferIn(plan, "y"), 0))[0]).toBe(r < 2 ? -2e6 : 204);
        }
        await closeAll(fleets);
      }
    },
  );
});

/** One rank, or more, each with buffers x and y of one value, and kernels put and spoil. */
const handOf = (over: Partial<Hand>): Plan =>
  handPlan({ target: "cuda:sm_90a", buffers: small, kernels: ["put", "spoil"].map(launchOf), ...over });
const failure = (promise: Promise<unknown>): Promise<Error> =>
  promise.then(
    () => expect.fail("nothing was thrown"),
    (error) => error,
  );

describe.skipIf(noCompiler)(`launches before a stand-in${noCompiler}`, () => {
  test("parameters are packed as the kernel declares them: pointers, ints, tensor maps, scratch", async () => {
    const map: Arg = { tensor: "x", dtype: "bf16", sizes: [72, 5], strides: [144], box: [64, 2], swizzle: "128B" };
    const args: Arg[] = ["start(S)", "y", map, "rows", "scratch+512", "start(T)", "needed", map];
    const kernel: Kernel = {
      ...launchOf("look"),
      scratch: 1024,
      launches: [{ entry: "look", grid: [3, 2, 1], threads: 96, shared: 0, args }],
    };
    const buffers = {
      x: { kind: "activation", dtype: "bf16", shape: [5, 72] },
      y: { kind: "activation", shape: [5], ragged: 3, rows: "r" },
      r: { kind: "activation", dtype: "i32", shape: [16] },
      "r.needed": { kind: "gradient", dtype: "i32", shape: [] },
    } as const satisfies Hand["buffers"];
    const look: Compute = { ...runs("look", "y"), reads: { x: "x" }, rows: "r", dims: { S: [8, [0]], T: [30, [0]] } };
    const plan = handPlan({ world: 2, slots: 2, target: "cuda:sm_90a", buffers, kernels: [kernel], forward: [look] });
    const seen: { params: DataView; how: object }[] = [];
    cuda.serve({ look: (params, how) => void seen.push({ params, how }) });
    const fleets = await openAll(plan);
    for (const slot of [0, 1]) fleets[1]!.backend(1).compute(look, slot);
    await fleets[1]!.finish();
    await closeAll(fleets);
    const [first, second] = seen.map(({ params }) => params) as [DataView, DataView];
    const pointer = (view: DataView, at: number) => Number(view.getBigUint64(at, true));
    const mapAt = (view: DataView, at: number) => ({
      tensor: pointer(view, at),
      sizes: [pointer(view, at + 8), pointer(view, at + 16), pointer(view, at + 24)],
      strides: [pointer(view, at + 48), pointer(view, at + 56)],
      rest: [...new Uint8Array(view.buffer, view.byteOffset + at + 80, 9)],
    });
    // int 0, y 8, map 64, rows 192, scratch 200, int 208, needed 216, map 256
    expect(seen.map(({ params, how }) => [params.byteLength, how])).toEqual(
      seen.map(() => [384, { grid: [3, 2, 1], threads: 96, shared: 0 }]),
    );
    expect([first.getInt32(0, true), first.getInt32(208, true)]).toEqual([4, 15]);
    const x = mapAt(first, 64);
    // box less one of each dim; bf16 is 9, rank 2, swizzle of 128 bytes 3, promotion to 128 bytes 2
    expect(x).toEqual({ tensor: x.tensor, sizes: [72, 5, 0], strides: [144, 0], rest: [63, 1, 0, 0, 0, 9, 2, 3, 2] });
    expect(mapAt(first, 256)).toEqual(x);
    const { offsets, activation } = plan.memory[0]!;
    const base = x.tensor - offsets.x!;
    expect([pointer(first, 8), pointer(first, 192)]).toEqual([base + offsets.y!, base + offsets.r!]);
    // the other slot's activations lie one arena on; scratch and gradients are the same
    for (const at of [8, 64, 192, 256]) expect(pointer(second, at) - pointer(first, at)).toBe(activation);
    for (const at of [200, 216]) expect(pointer(second, at)).toBe(pointer(first, at));
  });

  test("more than 48 KiB of shared memory is asked for; more than a block may have is an error", async () => {
    const withShared = (shared: number) =>
      handOf({
        kernels: [{ ...launchOf("put"), launches: launchOf("put").launches.map((l) => ({ ...l, shared })) }],
        forward: [runs("put", "x")],
      });
    cuda.serve(putAndSpoil);
    const plan = withShared(200 << 10);
    const fleets = await openAll(plan);
    await step(fleets, plan, () => Float32Array.of());
    await closeAll(fleets);
    expect(await failure(openAll(withShared(228 << 10)))).toMatchObject({
      message: expect.stringMatching(/^kernel put \(put in f32\): put wants 16 \+ 233472 bytes of shared memory.* 232448$/),
    });
  });

  test("a launch that the driver refuses says which kernel it was", async () => {
    const plan = handOf({
      kernels: [
        { ...launchOf("put"), launches: launchOf("put").launches.map((l) => ({ ...l, grid: [1, 70_000, 1] as [number, number, number] })) },
      ],
      forward: [runs("put", "x")],
    });
    const [fleet] = await openAll(plan);
    expect(() => fleet!.backend(0).compute(plan.programs[0]!.forward[0] as Compute, 0)).toThrow(
      "kernel put (put in f32): put, 1x70000x1 blocks of 1, 0 bytes: cuLaunchKernel: CUresult 1: CUresult 1",
    );
    await fleet!.close();
  });
});

describe.skipIf(noCompiler)(`what goes wrong, before stand-ins${noCompiler}`, () => {
  afterEach(() => {
    vi.stubEnv("STAND_IN_FREE", undefined);
    cuda.failNccl(0);
  });

  test("a device that lacks the memory is said before anything is allocated, with the numbers", async () => {
    const plan = planOf({ world: 1 });
    vi.stubEnv("STAND_IN_FREE", String(plan.memory[0]!.peak - 1));
    const trouble = await failure(openAll(asCuda(plan).plan));
    expect(trouble).toMatchObject({
      name: "Trouble",
      exit: 3,
      message: expect.stringMatching(/^rank 0 needs \d+\.\d\d GiB of device 0 \(Stand-in 0\): \d.* of its 141\.00 GiB are free$/),
    });
  });

  test.each([
    ["cuda:sm_80", /for cuda:sm_80, and device 0 \(Stand-in 0\) is of compute capability 9/, 3],
    ["cuda:sm_100a", /for cuda:sm_100a, .* 9/, 3],
    ["cpu", /is compiled for cpu, and not for CUDA/, 2],
  ])("a plan for %s does not run on an sm_90", async (target, message, exit) => {
    const { plan } = asCuda(planOf({ world: 1 }));
    const other = { ...plan, toolchain: { ...plan.toolchain, target } };
    expect(await failure(openAll(other))).toMatchObject({
      name: "Trouble",
      exit,
      message: expect.stringMatching(message),
      fix: expect.stringContaining("cuda:sm_90a"),
    });
  });

  test("a device that is not there", async () => {
    expect(await failure(openAll(handOf({}), { device: 99 }))).toMatchObject({
      name: "Trouble",
      exit: 3,
      message: expect.stringContaining("device 99"),
    });
  });

  test("rows beyond their bound end the step, eagerly and replayed", async () => {
    const needed: Compute = { ...runs("count", "n"), dims: {} };
    const kernel = { ...launchOf("count"), launches: launchOf("count").launches.map((l) => ({ ...l, args: ["y"] })) };
    const plan = handOf({
      kernels: [kernel],
      buffers: { n: { kind: "gradient", dtype: "i32", shape: [] } },
      bounds: [{ needed: "n", bound: 8 }],
      forward: [needed],
    });
    const [fleet] = await openAll(plan);
    let rows = 8;
    cuda.serve({ count: (params) => new Int32Array(bytesAt(params.getBigUint64(0, true), 4)).fill(rows) });
    for (let n = 0; n < 3; n++) await step([fleet!], plan, () => Float32Array.of());
    rows = 9;
    expect(await failure(step([fleet!], plan, () => Float32Array.of()))).toMatchObject({
      name: "Trouble",
      message: "n, rank 0: the router sent 9 rows, and the plan holds at most 8",
    });
    await fleet!.close();
  });

  test("a rank that fails ends the wait of the others; so does an abort from outside", async () => {
    const plan = handOf({ world: 2, forward: [moveOf("all_reduce", "x", "y")] });
    const alone = async (settings: Settings, wrong: () => void) => {
      const [fleet, other] = await openAll(plan, settings);
      fleet!.beginStep();
      fleet!.comm.move(0, plan.programs[0]!.forward[0] as Move, at);
      const ended = failure(fleet!.finish());
      setTimeout(wrong, 20);
      const error = await ended;
      await closeAll([fleet!, other!]);
      return error;
    };
    expect(await alone({}, () => cuda.failNccl(1))).toMatchObject({
      name: "Trouble",
      exit: 3,
      message: expect.stringContaining("remote process exited"),
    });
    cuda.failNccl(0);
    const controller = new AbortController();
    expect(await alone({ signal: controller.signal }, () => controller.abort(new Error("rank 1 has left")))).toMatchObject({
      message: "rank 1 has left",
    });
  });

  test("within a step that is a graph nothing is read, and the writes of all steps are alike", async () => {
    const plan = handOf({});
    const [x, y] = [bufferIn(plan, "x"), bufferIn(plan, "y")];
    const [fleet] = await openAll(plan);
    const backend = fleet!.backend(0);
    const written = async (...all: readonly [Buffer, number][]) => {
      fleet!.beginStep();
      for (const [b, value] of all) backend.write(b, 0, Float32Array.of(value));
      await fleet!.finish();
    };
    await written([x, 1], [y, 2]);
    await written([x, 3], [y, 4]);
    await written([x, 5], [y, 6]);
    expect([(await backend.read(x, 0))[0], (await backend.read(y, 0))[0]]).toEqual([5, 6]);
    fleet!.beginStep();
    expect(await failure(backend.read(x, 0))).toMatchObject({ message: expect.stringContaining("open with graph: false") });
    expect(() => backend.write(y, 0, Float32Array.of(1))).toThrow("write 0 of step 4 is y (slot 0), and was x (slot 0)");
    expect(() => backend.write(x, 0, Float32Array.of(1, 2))).toThrow("2 values are written to x, which holds 1");
    expect(await failure(fleet!.finish())).toMatchObject({ message: expect.stringContaining("wrote 0 of 2 inputs") });
    await fleet!.close();
  });
});

test.skipIf(noCompiler)(`a profile has every instruction, its lane and its times, before stand-ins${noCompiler}`, async () => {
  const reference = planOf({ world: 4, pipeline: 2, distributed_optimizer: true });
  const { plan, kernels } = asCuda(reference);
  cuda.serve(kernels);
  const fleets = await openAll(plan, { profile: true });
  const { replayed } = await train(fleets, plan);
  expect(replayed.flat()).not.toContain(true);
  for (const [r, f] of fleets.entries()) {
    const p = plan.programs[Math.floor(r / 2)]!;
    const all = f.profile();
    const inOrder = [...p.order.flatMap((o) => (o.startsWith("F") ? p.forward : p.backward)), ...p.step];
    expect(all.map(({ id }) => id)).toEqual(inOrder.map(({ id }) => id));
    expect(new Set(all.map(({ stream }) => stream))).toEqual(
      new Set(["compute", "comm", `send ${1 - Math.floor(r / 2)}`, `recv ${1 - Math.floor(r / 2)}`]),
    );
    for (const [n, t] of all.entries()) {
      expect(t.end_us).toBeGreaterThan(t.begin_us);
      expect([t.rank, t.kernel]).toEqual([r, inOrder[n]!.kind === "compute" ? (inOrder[n] as Compute).kernel : ""]);
    }
  }
  await closeAll(fleets);
});
