/** NCCL's collectives and transfers, before stand-ins for it and the driver: what each rank gets, and what waits for what. */
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import type { HostData } from "../../runtime/backend.ts";
import type { Dtype } from "../../schemas/dtypes.ts";
import type { Collective, CollectiveKind, Instruction, Plan } from "../../schemas/plan.ts";
import { blockRuns } from "../support/blockRuns.ts";
import { at, launchOf, moveOf, putAndSpoil, type Ranks, runs, small, standInRanks } from "../support/cudaRanks.ts";
import { noCompiler } from "../support/cudaStandIn.ts";
import { bufferIn, type Hand, handPlan, withForward } from "../support/handPlan.ts";
import { random } from "../support/opCases.ts";
import { closeAll } from "../support/steps.ts";

let cuda: Ranks;
beforeAll(async () => {
  if (!noCompiler) cuda = await standInRanks();
});
afterAll(() => vi.unstubAllEnvs());

/** Random values of a type, small enough that sums of a few are exact. */
const valuesOf = (dtype: Dtype, count: number, seed: number): HostData => {
  const next = random(seed);
  const all = Array.from({ length: count }, () => Math.round(next() * 100));
  return dtype === "i32" ? Int32Array.from(all) : Float32Array.from(all);
};
describe.skipIf(noCompiler)(`collectives with stand-ins${noCompiler}`, () => {
  const g = 4;
  const n = 5;
  type Case = { readonly from: number; readonly to: number; readonly want: (held: readonly HostData[], r: number) => number[] };
  const sum = (held: readonly HostData[], i: number): number => held.reduce((s, h) => s + h[i]!, 0);
  const cases: Record<CollectiveKind, Case> = {
    all_gather: { from: n, to: g * n, want: (held) => held.flatMap((h) => [...h]) },
    reduce_scatter: { from: g * n, to: n, want: (held, r) => Array.from({ length: n }, (_, i) => sum(held, r * n + i)) },
    all_to_all: { from: g * n, to: g * n, want: (held, r) => held.flatMap((h) => [...h.slice(r * n, (r + 1) * n)]) },
    all_reduce: { from: n, to: n, want: (held) => Array.from({ length: n }, (_, i) => sum(held, i)) },
    all_reduce_max: { from: n, to: n, want: (held) => Array.from({ length: n }, (_, i) => Math.max(...held.map((h) => h[i]!))) },
    shift: { from: n, to: n, want: (held, r) => [...held[(r + g - 1) % g]!] },
  };
  const all = Object.keys(cases) as CollectiveKind[];

  async function expectMoved(how: CollectiveKind, dtype: Dtype, within: boolean, from: Ranks): Promise<void> {
    const { from: a, to: b, want } = cases[how];
    const [x, y] = [
      { dtype, shape: [a] },
      { dtype, shape: [b] },
    ];
    // the larger of two that share their first byte is the one that has a place
    const buffers: Hand["buffers"] = !within ? { x, y } : a >= b ? { x, y: { ...y, within: "x" } } : { y, x: { ...x, within: "y" } };
    const plan = handPlan({ world: g, target: "cuda:sm_90a", buffers, forward: [moveOf(how, "x", "y")] });
    const fleets = await from.openAll(plan);
    const held = fleets.map((_, r) => valuesOf(dtype, a, r));
    for (const [r, f] of fleets.entries()) f.rankDevice(r).write(bufferIn(plan, "x"), 0, held[r]!);
    for (const [r, f] of fleets.entries())
      expect(f.comm.collective(r, plan.programs[0]!.chunks[0]!.forward[0] as Collective, at)).toBe(true);
    await Promise.all(fleets.map((f) => f.finish()));
    for (const [r, f] of fleets.entries())
      expect([...(await f.rankDevice(r).read(bufferIn(plan, "y"), 0))], `rank ${r}`).toEqual(want(held, r));
    await closeAll(fleets);
  }
  test.each(all)("%s, in each type, apart and in the source's own place", async (how) => {
    for (const dtype of ["f32", "bf16", "i32"] as const) for (const within of [false, true]) await expectMoved(how, dtype, within, cuda);
  });
  test("an NCCL without all-to-all exchanges by a group of sends and receives", async () => {
    const old = await standInRanks({ oldNccl: true });
    for (const within of [false, true]) await expectMoved("all_to_all", "f32", within, old);
  });

  test("a group has equal coordinates on all other sub-axes'", async () => {
    const hand = handPlan({
      world: 8,
      target: "cuda:sm_90a",
      buffers: { x: { shape: [1] }, y: { shape: [1] }, z: { shape: [1] }, w: { shape: [1] } },
    });
    const subAxes = [
      { stride: 1, size: 2 },
      { stride: 2, size: 1 },
      { stride: 2, size: 4 },
    ];
    const forward = [
      moveOf("all_reduce", "x", "y", { subAxes: [2, 1] }),
      moveOf("all_reduce", "x", "z", { world: true, subAxes: [0, 2] }),
      moveOf("all_reduce", "x", "w", { subAxes: [1] }),
    ];
    const plan: Plan = { ...hand, mesh: { ...hand.mesh, subAxes }, programs: hand.programs.map((p) => withForward(p, forward)) };
    const fleets = await cuda.openAll(plan);
    for (const [r, f] of fleets.entries()) {
      f.rankDevice(r).write(bufferIn(plan, "x"), 0, Float32Array.of(2 ** r));
      for (const i of forward) f.comm.collective(r, i, at);
    }
    const read = (r: number, id: string) => fleets[r]!.rankDevice(r).read(bufferIn(plan, id), 0);
    for (let r = 0; r < 8; r++)
      expect([(await read(r, "y"))[0], (await read(r, "z"))[0], (await read(r, "w"))[0]]).toEqual([
        r % 2 ? 0b10101010 : 0b1010101,
        255,
        2 ** r,
      ]);
    await closeAll(fleets);
  });

  test.each([true, false])("kernels concurrent with a collective wait for it if they access its bytes; graph: %s", async (graph) => {
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
      const fleets = await cuda.openAll(plan, { graph });
      for (let n = 1; n <= 4; n++) {
        await cuda.step(fleets, plan, () => Float32Array.of());
        for (const [r, f] of fleets.entries())
          for (const [id, want] of Object.entries({ x: -1e6, y: 204, z: 408 }))
            expect([id, (await f.rankDevice(r).read(bufferIn(plan, id), 0))[0]]).toEqual([id, want]);
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
        channel: "forward",
        bytes: 4,
        why: { op: "", because: "", path: "" },
      });
      const hand = handPlan({ world: 4, stages: 2, target: "cuda:sm_90a", buffers: small, kernels: ["put", "spoil"].map(launchOf) });
      const forward = [
        [runs("put", "x"), transfer("send", 1), runs("spoil", "x"), moveOf("all_reduce", "x", "y")],
        [runs("spoil", "x"), transfer("recv", 0), moveOf("all_reduce", "x", "y"), runs("spoil", "x")],
      ];
      const order = blockRuns("F0 F1 F2");
      const plan: Plan = { ...hand, programs: hand.programs.map((p, s) => ({ ...withForward(p, forward[s]!), order })) };
      for (let seed = 0; seed < 20; seed++) {
        cuda.seed(seed);
        const fleets = await cuda.openAll(plan, { graph });
        for (let n = 1; n <= 3; n++) {
          await cuda.step(fleets, plan, () => Float32Array.of());
          for (const [r, f] of fleets.entries()) expect((await f.rankDevice(r).read(bufferIn(plan, "y"), 0))[0]).toBe(r < 2 ? -2e6 : 204);
        }
        await closeAll(fleets);
      }
    },
  );
});
