/** Collectives among ranks on one WebGPU device: what each member gets, also where source and destination share bytes. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { HostData } from "../../runtime/backend.ts";
import { openWebgpu } from "../../runtime/webgpu/dawn.ts";
import type { Dtype } from "../../schemas/dtypes.ts";
import type { Collective, CollectiveKind, Transfer } from "../../schemas/plan.ts";
import { bufferIn, handPlan } from "../support/handPlan.ts";
import { noAdapter, noHalves } from "../support/softwareAdapter.ts";

const at = { tag: "F0", microbatch: 0, copy: 0 };
const noSources = {
  kernel: (): string => {
    throw new Error("no kernels here");
  },
};
const move = (how: CollectiveKind): Collective => ({
  ...{ kind: "collective", id: "m", how, name: how, axes: "tp", subAxes: [0], from: "from", to: "to", bytes: 0 },
  why: { op: "", because: "", path: "" },
});

/** What member k gets of [length of a piece] × members, by the definition of each collective. */
const wanted: Record<CollectiveKind, (held: readonly HostData[], k: number) => number[]> = {
  all_gather: (held) => held.flatMap((h) => [...h]),
  all_to_all: (held, k) => held.flatMap((h) => block(h, k, held.length)),
  reduce_scatter: (held, k) => block(sums(held), k, held.length),
  all_reduce: (held) => [...sums(held)],
  shift: (held, k) => [...held[(k + held.length - 1) % held.length]!],
  all_reduce_max: (held) => [...held[0]!].map((_, i) => Math.max(...held.map((h) => h[i]!))),
};
const block = (x: HostData, k: number, of: number): number[] => [...x].slice((k * x.length) / of, ((k + 1) * x.length) / of);
const sums = (held: readonly HostData[]): Float32Array =>
  held.slice(1).reduce<Float32Array>((sum, h) => sum.map((x, i) => x + h[i]!), Float32Array.from(held[0]!));

/** Fills a block on every rank with small numbers, runs the collective, and returns what each rank received and what is expected. */
async function moved(how: CollectiveKind, dtype: Dtype, members: number, n: number, shared: boolean) {
  const from = how === "reduce_scatter" || how === "all_to_all" ? n * members : n;
  const to = how === "all_gather" || how === "all_to_all" ? n * members : n;
  const m = move(how);
  const [small, large] = from < to ? (["from", "to"] as const) : (["to", "from"] as const);
  const shapes = { from: { shape: [from], dtype }, to: { shape: [to], dtype } };
  const plan = handPlan({
    world: members,
    target: dtype === "f16" ? "webgpu:f16" : "webgpu:baseline",
    buffers: { [large]: shapes[large], [small]: { ...shapes[small], ...(shared ? { within: large } : {}) }, after: { shape: [3] } },
    forward: [m],
  });
  const localRanks = await openWebgpu(plan, noSources);
  try {
    const held = localRanks.ranks.map((r) => {
      const whole = Array.from({ length: from }, (_, i) => ((r * 31 + i * 7) % 61) - 30);
      // sums of fractions depend on their order; 16 bits hold small integers, and their sums, without rounding
      return dtype === "i32" ? Int32Array.from(whole) : Float32Array.from(whole, (x, i) => (dtype === "f32" ? x + Math.sin(r + i) : x));
    });
    for (const r of localRanks.ranks) localRanks.rankDevice(r).write(bufferIn(plan, "after"), 0, Float32Array.of(1, 2, 3));
    for (const r of localRanks.ranks) localRanks.rankDevice(r).write(bufferIn(plan, "from"), 0, held[r]!);
    for (const r of localRanks.ranks) expect(localRanks.comm.collective(r, m, at)).toBe(r === members - 1);
    for (const r of localRanks.ranks.slice(0, -1)) expect(localRanks.comm.collective(r, m, at)).toBe(true);
    await localRanks.finish();
    const got = await Promise.all(localRanks.ranks.map((r) => localRanks.rankDevice(r).read(bufferIn(plan, "to"), 0)));
    for (const r of localRanks.ranks) expect([...(await localRanks.rankDevice(r).read(bufferIn(plan, "after"), 0))]).toEqual([1, 2, 3]);
    return { got: got.map((x) => [...x]), should: localRanks.ranks.map((k) => wanted[how](held, k)) };
  } finally {
    await localRanks.close();
  }
}

const hows: readonly CollectiveKind[] = ["all_gather", "all_to_all", "reduce_scatter", "all_reduce", "all_reduce_max"];

describe.skipIf(noAdapter)(`collectives on one device${noAdapter ? `: skipped, ${noAdapter}` : ""}`, () => {
  describe.each(hows)("%s", (how) => {
    test("any group, any length, with equal or different source and destination", async () => {
      await fc.assert(
        fc.asyncProperty(fc.integer({ min: 1, max: 4 }), fc.integer({ min: 1, max: 700 }), fc.boolean(), async (members, n, shared) => {
          const { got, should } = await moved(how, "f32", members, n, shared);
          expect(got).toEqual(should);
        }),
        { numRuns: 6 },
      );
    });
    test("more members than a kernel has bindings", async () => {
      const { got, should } = await moved(how, "f32", 16, 5, true);
      expect(got).toEqual(should);
    });
  });
  test.each(["all_gather", "all_to_all"] as const)("%s of integers", async (how) => {
    const { got, should } = await moved(how, "i32", 3, 5, true);
    expect(got).toEqual(should);
  });

  test("a message has the content at the time of sending; each stage receives its own", async () => {
    const plan = handPlan({ world: 4, stages: 2, buffers: { x: { shape: [5] }, y: { shape: [5] } } });
    const [x, y] = [bufferIn(plan, "x"), bufferIn(plan, "y")];
    const transfer = (kind: "send" | "recv", buffer: string, peer: number): Transfer => ({
      ...{ kind, id: `${kind} ${buffer}`, buffer, tag: "t", peer, channel: "forward", bytes: 20 },
      why: { op: "", because: "", path: "" },
    });
    const localRanks = await openWebgpu(plan, noSources);
    try {
      const { comm } = localRanks;
      const value = (rank: number, letter: number) => Float32Array.from({ length: 5 }, (_, i) => 100 * rank + 10 * letter + i);
      expect(comm.recv(2, transfer("recv", "y", 0), at)).toBe(false);
      // twice, so that the second round is written into the letters of the first
      for (let round = 0; round < 2; round++) {
        for (const r of [0, 1])
          for (const letter of [0, 1]) {
            localRanks.rankDevice(r).write(x, 0, value(r, letter + 2 * round));
            comm.send(r, transfer("send", "x", 1), at);
            localRanks.rankDevice(r).write(x, 0, Float32Array.of(0, 0, 0, 0, 0));
          }
        for (const letter of [0, 1])
          for (const r of [2, 3]) {
            expect(comm.recv(r, transfer("recv", "y", 0), at)).toBe(true);
            expect([...(await localRanks.rankDevice(r).read(y, 0))]).toEqual([...value(r - 2, letter + 2 * round)]);
          }
        expect(comm.recv(3, transfer("recv", "y", 0), at)).toBe(false);
      }
    } finally {
      await localRanks.close();
    }
  });
});

describe.skipIf(noHalves)(`collectives of 16-bit floats${noHalves ? `: skipped, ${noHalves}` : ""}`, () => {
  test.each(hows)("%s: blocks that end within a word", async (how) => {
    for (const [members, n] of [
      [3, 5],
      [2, 6],
      [1, 1],
    ] as const) {
      const { got, should } = await moved(how, "f16", members, n, members > 2);
      expect(got).toEqual(should);
    }
  });
});
