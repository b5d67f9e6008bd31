/** The CUDA backend before stand-ins for the driver and NCCL: what a launch is given, and what goes wrong. */
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import type { CudaRanks } from "../../runtime/cuda/backend.ts";
import type { Arg, Buffer, Collective, Compute, Kernel } from "../../schemas/plan.ts";
import { scratch, startOf } from "../../src/codegen/launchArgs.ts";
import {
  at,
  failure,
  handOf,
  launchOf,
  moveOf,
  planOf,
  putAndSpoil,
  type Ranks,
  runs,
  type Settings,
  standInRanks,
} from "../support/cudaRanks.ts";
import { asCuda, bytesAt, noCompiler } from "../support/cudaStandIn.ts";
import { bufferIn, type Hand, handPlan } from "../support/handPlan.ts";
import { closeAll } from "../support/steps.ts";

let cuda: Ranks;
beforeAll(async () => {
  if (!noCompiler) cuda = await standInRanks();
});
afterAll(() => vi.unstubAllEnvs());

describe.skipIf(noCompiler)(`launches with a stand-in driver${noCompiler}`, () => {
  test("parameters are packed as the kernel declares them: pointers, ints, tensor maps, scratch", async () => {
    const map: Arg = { kind: "tensor_map", tensor: "x", dtype: "bf16", sizes: [72, 5], strides: [144], box: [64, 2], swizzle: "128B" };
    const args: Arg[] = [
      startOf("S"),
      { kind: "operand", name: "y" },
      map,
      { kind: "rows" },
      scratch(512),
      startOf("T"),
      { kind: "needed" },
      map,
    ];
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
    const plan = handPlan({ world: 2, copies: 2, target: "cuda:sm_90a", buffers, kernels: [kernel], forward: [look] });
    const seen: { params: DataView; how: object }[] = [];
    cuda.serve({ look: (params, how) => void seen.push({ params, how }) });
    const fleets = await cuda.openAll(plan);
    for (const copy of [0, 1]) fleets[1]!.rankDevice(1).compute(look, copy);
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
    expect(seen.map(({ how }) => how)).toEqual(seen.map(() => ({ grid: [3, 2, 1], threads: 96, shared: 0 })));
    expect([first.getInt32(0, true), first.getInt32(208, true)]).toEqual([4, 15]);
    const x = mapAt(first, 64);
    // box less one of each dim; bf16 is 9, rank 2, swizzle of 128 bytes 3, promotion to 128 bytes 2
    expect(x).toEqual({ tensor: x.tensor, sizes: [72, 5, 0], strides: [144, 0], rest: [63, 1, 0, 0, 0, 9, 2, 3, 2] });
    expect(mapAt(first, 256)).toEqual(x);
    const { offsets, activation } = plan.memory[0]!;
    const base = x.tensor - offsets.x!;
    expect([pointer(first, 8), pointer(first, 192)]).toEqual([base + offsets.y!, base + offsets.r!]);
    // the other slot's activations lie one arena on; scratch and gradients are the same
    for (const at of [8, 64, 192, 256]) expect(pointer(second, at) - pointer(first, at)).toBe(activation[0]);
    for (const at of [200, 216]) expect(pointer(second, at)).toBe(pointer(first, at));
  });

  test("more than 48 KiB of shared memory is requested from the driver; more than the limit of a block is an error", async () => {
    const withShared = (shared: number) =>
      handOf({
        kernels: [{ ...launchOf("put"), launches: launchOf("put").launches.map((l) => ({ ...l, shared })) }],
        forward: [runs("put", "x")],
      });
    cuda.serve(putAndSpoil);
    const plan = withShared(200 << 10);
    const fleets = await cuda.openAll(plan);
    await cuda.step(fleets, plan, () => Float32Array.of());
    await closeAll(fleets);
    expect(await failure(cuda.openAll(withShared(228 << 10)))).toMatchObject({
      message: expect.stringMatching(/^kernel put \(add in f32\): put wants 16 \+ 233472 bytes of shared memory.* 232448$/),
    });
  });

  test("the error of a refused launch names the kernel", async () => {
    const plan = handOf({
      kernels: [
        { ...launchOf("put"), launches: launchOf("put").launches.map((l) => ({ ...l, grid: [1, 70_000, 1] as [number, number, number] })) },
      ],
      forward: [runs("put", "x")],
    });
    const [localRanks] = await cuda.openAll(plan);
    expect(() => localRanks!.rankDevice(0).compute(plan.programs[0]!.chunks[0]!.forward[0] as Compute, 0)).toThrow(
      "kernel put (add in f32): put, 1x70000x1 blocks of 1, 0 bytes: cuLaunchKernel: CUresult 1: CUresult 1",
    );
    await localRanks!.close();
  });
});

describe.skipIf(noCompiler)(`errors, with stand-ins${noCompiler}`, () => {
  afterEach(() => {
    vi.stubEnv("STAND_IN_FREE", undefined);
    cuda.failNccl(0);
  });

  test("too little device memory is reported before any allocation, with the numbers", async () => {
    const plan = planOf({ world: 1 });
    vi.stubEnv("STAND_IN_FREE", String(plan.memory[0]!.peak - 1));
    const trouble = await failure(cuda.openAll(asCuda(plan).plan));
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
    expect(await failure(cuda.openAll(other))).toMatchObject({
      name: "Trouble",
      exit,
      message: expect.stringMatching(message),
      fix: expect.stringContaining("cuda:sm_90a"),
    });
  });

  test("a device that is not there", async () => {
    expect(await failure(cuda.openAll(handOf({}), { device: 99 }))).toMatchObject({
      name: "Trouble",
      exit: 3,
      message: expect.stringContaining("device 99"),
    });
  });

  test("rows above their bound end the step, with and without a graph", async () => {
    const needed: Compute = { ...runs("count", "n"), dims: {} };
    const kernel = {
      ...launchOf("count"),
      launches: launchOf("count").launches.map((l) => ({ ...l, args: l.args.filter((a) => a.kind === "operand") })),
    };
    const plan = handOf({
      kernels: [kernel],
      buffers: { n: { kind: "gradient", dtype: "i32", shape: [] } },
      bounds: [{ needed: "n", bound: 8 }],
      forward: [needed],
    });
    const [localRanks] = await cuda.openAll(plan);
    const rows = [8, 8, 8, 9, 8];
    let step = 0;
    cuda.serve({ count: (params) => new Int32Array(bytesAt(params.getBigUint64(0, true), 4)).fill(rows[step++] ?? 0) });
    for (let n = 0; n < 3; n++) await cuda.step([localRanks!], plan, () => Float32Array.of());
    // the next step begins before the end of the one with too many rows is awaited
    expect(localRanks!.canBeginAhead?.(1, "training")).toBe(true);
    localRanks!.beginStep(1);
    const exceeded = failure(localRanks!.finish());
    localRanks!.beginStep(1);
    const next = localRanks!.finish();
    expect(await exceeded).toMatchObject({
      name: "Trouble",
      message: "n, rank 0: the router sent 9 rows, and the plan holds at most 8",
    });
    await next;
    expect(localRanks!.canBeginAhead?.(2, "training")).toBe(false);
    expect(localRanks!.canBeginAhead?.(1, "logged")).toBe(false);
    await localRanks!.close();
  });

  test("steps that begin before the end of others have inputs and results of their own", async () => {
    const plan = handOf({ world: 2, forward: [moveOf("all_reduce", "x", "y")] });
    const [x, y] = [bufferIn(plan, "x"), bufferIn(plan, "y")];
    const all = await cuda.openAll(plan);
    const [first, second] = all;
    if (!first || !second) throw new Error("no ranks");
    const begin = (ranks: CudaRanks, value: number) => {
      const [rank = 0] = ranks.ranks;
      const device = ranks.rankDevice(rank);
      const replayed = ranks.beginStep(1);
      device.write(x, 0, Float32Array.of(value));
      if (!replayed) ranks.comm.collective(rank, plan.programs[0]!.chunks[0]!.forward[0] as Collective, at);
      return Promise.all([ranks.finish(), device.read(y, 0)]).then(([, sum]) => sum[0]);
    };
    for (let n = 0; n < 2; n++) await Promise.all([begin(first, 1), begin(second, 1)]);
    // the first replay waits for the other rank, the second has not read its inputs when those of the third are written
    const early = [1, 2].map((value) => begin(first, value));
    // the times of the replay before, which has ended, and of the one under way
    expect(first.idle()).toBeGreaterThanOrEqual(0);
    early.push(begin(first, 3));
    const late = [10, 20, 30].map((value) => begin(second, value));
    expect(await Promise.all(early)).toEqual([11, 22, 33]);
    expect(await Promise.all(late)).toEqual([11, 22, 33]);
    for (const ranks of all) expect(ranks.idle()).toBeLessThanOrEqual(1);
    await closeAll(all);
  });

  test("a failed rank and an external abort end the waits of the other ranks", async () => {
    const plan = handOf({ world: 2, forward: [moveOf("all_reduce", "x", "y")] });
    const alone = async (settings: Settings, wrong: () => void) => {
      const [localRanks, other] = await cuda.openAll(plan, settings);
      localRanks!.beginStep(1);
      localRanks!.comm.collective(0, plan.programs[0]!.chunks[0]!.forward[0] as Collective, at);
      const ended = failure(localRanks!.finish());
      setTimeout(wrong, 20);
      const error = await ended;
      await closeAll([localRanks!, other!]);
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

  test("the error of a step that does not end names the last instruction of the device", async () => {
    const plan = handOf({ world: 2, forward: [runs("put", "x"), moveOf("all_reduce", "x", "y"), runs("put", "z")] });
    cuda.serve(putAndSpoil);
    const fleets = await cuda.openAll(plan, { profile: true });
    const [put, move, other] = plan.programs[0]!.chunks[0]!.forward as [Compute, Collective, Compute];
    const issue = (rank: number) => {
      fleets[rank]!.beginStep(1);
      fleets[rank]!.rankDevice(rank).compute(put, 0);
      fleets[rank]!.comm.collective(rank, move, at);
      fleets[rank]!.rankDevice(rank).compute(other, 0);
      return fleets[rank]!.finish();
    };
    // the other rank has not come
    const first = issue(0);
    expect(fleets[0]!.underWay()).toMatchObject({ id: "y.all_reduce", op: "all_reduce" });
    await Promise.all([first, issue(1)]);
    expect(fleets[0]!.underWay()).toBeUndefined();
    await closeAll(fleets);
  });

  test("a captured step reads nothing, and all steps write the same slots", async () => {
    const plan = handOf({});
    const [x, y] = [bufferIn(plan, "x"), bufferIn(plan, "y")];
    const [localRanks] = await cuda.openAll(plan);
    const backend = localRanks!.rankDevice(0);
    const written = async (...all: readonly [Buffer, number][]) => {
      localRanks!.beginStep(1);
      for (const [b, value] of all) backend.write(b, 0, Float32Array.of(value));
      await localRanks!.finish();
    };
    await written([x, 1], [y, 2]);
    await written([x, 3], [y, 4]);
    await written([x, 5], [y, 6]);
    expect([(await backend.read(x, 0))[0], (await backend.read(y, 0))[0]]).toEqual([5, 6]);
    localRanks!.beginStep(1);
    expect(await failure(backend.read(x, 0))).toMatchObject({ message: expect.stringContaining("open with graph: false") });
    expect(() => backend.write(y, 0, Float32Array.of(1))).toThrow("write 0 of step 4 is y (slot 0), and was x (slot 0)");
    expect(() => backend.write(x, 0, Float32Array.of(1, 2))).toThrow("2 values are written to x, which holds 1");
    expect(await failure(localRanks!.finish())).toMatchObject({ message: expect.stringContaining("wrote 0 of 2 inputs") });
    await localRanks!.close();
  });
});
