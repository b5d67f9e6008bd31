/**
 * Saving while training continues: a checkpoint has the state of the step after which it began, with the same bytes for any number of threads
 * and any memory; it is complete, or the previous one stays; and a full disk of one rank is an error on all ranks.
 */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setImmediate } from "node:timers/promises";
import { afterAll, beforeEach, describe, expect, test, vi } from "vitest";
import type { HostData, LocalRanks, RankDevice } from "../../runtime/backend.ts";
import { openCheckpoint } from "../../runtime/checkpoint/checkpoint.ts";
import { expectComplete, SaveFault } from "../../runtime/checkpoint/commit.ts";
import { openSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { newestCheckpoint } from "../../runtime/checkpoint/saveFolder.ts";
import { SaveMemory } from "../../runtime/checkpoint/saveMemory.ts";
import { CheckpointSaver, type SaverSettings } from "../../runtime/checkpoint/saver.ts";
import { blocksOf, stateFiles } from "../../runtime/checkpoint/stateFiles.ts";
import { openRun, PREPARING } from "../../runtime/train/openRun.ts";
import type { Buffer, Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { compile } from "../../src/compile.ts";
import { planOf, standInRanks } from "../support/cudaRanks.ts";
import { asCuda, noCompiler } from "../support/cudaStandIn.ts";
import { fixture, jobOf, sameNumbers } from "../support/job.ts";
import { built } from "../support/rankc.ts";

const place = mkdtempSync(join(tmpdir(), "rankc-saver-"));
afterAll(() => rmSync(place, { recursive: true, force: true }));
let folder: string;
let made = 0;
beforeEach(() => {
  folder = join(place, String(made++));
});

const job = jobOf({
  name: "saver",
  model: { layers: 2, hidden: 32, heads: 4, vocab: 256, seq: 8, moe: { experts: 4, top_k: 2, ffn: 16 } },
  parallel: { world: 4, tensor: 2, sequence: true, expert: 2, distributed_optimizer: true },
  train: { micro_batch: 1, global_batch: 8, steps: 4, precision: "fp32", optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
});
const { plan } = compile(job);
const progress = (steps: number) => ({ steps, read: 8 * steps, trained: 8 * steps, updates: steps, loss_scale: null });

/** A device whose buffers have the value `now()` plus the index. */
const deviceOf = (now: () => number): RankDevice =>
  ({
    read: async ({ shape }: Buffer) => Float32Array.from({ length: elementsOf(shape) }, (_, i) => now() + i),
  }) as unknown as RankDevice;
const ranks = Array.from({ length: plan.mesh.world }, (_, r) => r);
const saverWith = (settings: Partial<SaverSettings>, now: () => number = () => 1): CheckpointSaver =>
  new CheckpointSaver({ plan, folder, version: "test", localRanks: { ranks, rankDevice: () => deviceOf(now) }, ...settings });
const bytesIn = (at: string) => readdirSync(at).map((name) => [name, readFileSync(join(at, name)).toString("base64")]);
const saveOnce = async (settings: Partial<SaverSettings>, at: string): Promise<[string, string][]> => {
  const saver = saverWith({ folder: at, ...settings });
  const { done } = await saver.begin(progress(1));
  const { folder: whole } = await done;
  await saver.close();
  return bytesIn(whole) as [string, string][];
};

test("any number of threads, any size of blocks, and any memory write the same bytes", async () => {
  const one = await saveOnce({ threads: 0 }, `${folder}-0`);
  expect(one.map(([name]) => name)).toContain("rank-00003.safetensors");
  vi.spyOn(process, "availableMemory").mockReturnValue(4);
  for (const [n, how] of [
    { threads: 0, blockBytes: 3000 },
    { threads: 3, blockBytes: 4096 },
  ].entries())
    expect(await saveOnce(how, `${folder}-${n + 1}`), JSON.stringify(how)).toEqual(one);
  vi.restoreAllMocks();
});

test("parts of tensors have digests of their own, whatever the blocks; one that differs is damage", async () => {
  const one = await saveOnce({ threads: 0, digestBytes: 256 }, `${folder}-0`);
  expect(await saveOnce({ threads: 2, blockBytes: 3000, digestBytes: 256 }, `${folder}-1`)).toEqual(one);
  const at = join(`${folder}-0`, "step-00000001");
  const path = join(at, "rank-00000.safetensors");
  const file = openSafetensors(path);
  const { start, bytes } = file.info("embed");
  expect(file.digestsOf("embed").map(({ from, to }) => to - from)).toEqual(Array.from({ length: bytes / 256 }, () => 256));
  file.read("embed");
  file.close();
  const all = readFileSync(path);
  all[start + bytes - 1]! ^= 1;
  writeFileSync(path, all);
  const damaged = openSafetensors(path);
  expect(() => damaged.read("embed")).toThrow("the SHA-256 of tensor embed differs");
  damaged.close();
});

test("blocks cover each file once; all pieces of a tensor go to one writer, in order", () => {
  for (const file of stateFiles(plan).files.values())
    for (const [size, writers] of [
      [512, 3],
      [4096, 1],
      [1 << 20, 4],
    ] as const) {
      const blocks = blocksOf(file, size, writers);
      expect(blocks.every(({ pieces }) => pieces.reduce((sum, { bytes }) => sum + bytes, 0) <= size)).toBe(true);
      const covered = blocks.flatMap(({ at, writer, pieces }) => pieces.map((piece) => ({ ...piece, start: at + piece.at, writer })));
      const inFile = [...covered].sort((a, b) => a.start - b.start);
      expect(inFile.reduce((end, { start, bytes }) => (start === end ? end + bytes : Number.NaN), 0)).toBe(file.bytes);
      for (const { name, bytes } of file.entries) {
        const own = covered.filter(({ tensor }) => tensor === name);
        expect(new Set(own.map(({ writer }) => writer)).size).toBe(1);
        expect(own.reduce((end, { from, bytes: n }) => (from === end ? end + n : Number.NaN), 0)).toBe(bytes);
        expect(own.map(({ last }) => last)).toEqual(own.map((_, i) => i === own.length - 1));
      }
    }
});

test("training during a write does not change the checkpoint; the next checkpoint waits for it", async () => {
  let value = 1;
  const saver = saverWith({ threads: 2, blockBytes: 1024 }, () => value);
  const first = await saver.begin(progress(1));
  value = 100;
  const second = await saver.begin(progress(2));
  expect(existsSync(join(folder, "step-00000001", "snapshot.json"))).toBe(true);
  value = 1000;
  for (const [pending, expected] of [
    [first, 1],
    [second, 100],
  ] as const) {
    const { folder: at, stallSeconds, seconds } = await pending.done;
    const checkpoint = openCheckpoint(at);
    // element 0 of the first piece is the value at the time of the copy
    expect(checkpoint.whole("norm")?.data[0]).toBe(expected);
    checkpoint.close();
    expect(stallSeconds).toBeLessThanOrEqual(seconds);
  }
  await saver.close();
});

describe("page-locked memory of a state that the device has no room for", () => {
  const MIB = 2 ** 20;
  /** Prepares a 13.2 GB state in so many steps of `step` seconds, with blocks that take `block` milliseconds. Returns the waits by step. */
  function prepared(steps: number, step: number, block: number): { missing: number; waits: number[] } {
    let now = 0;
    const clock = vi.spyOn(performance, "now").mockImplementation(() => now);
    const memory = vi.spyOn(process, "availableMemory").mockReturnValue(2 ** 37);
    const hostMemory = {
      allocate(bytes: number) {
        now += block;
        return { bytes: new Uint8Array(), address: BigInt(bytes) };
      },
      free: () => {},
    };
    const wanted = Math.ceil(13_200_908_053 / (32 * MIB)) + 4;
    const own = new SaveMemory({ localRanks: { hostMemory }, device: undefined, size: 32 * MIB, wanted });
    const waits = Array.from({ length: steps }, () => {
      const begun = now;
      own.prepare(1000 * PREPARING * step);
      return now - begun;
    });
    for (const mock of [clock, memory]) mock.mockRestore();
    return { missing: wanted - own.blocks.count, waits };
  }

  test("is complete before the first save after 150 steps, at the rate that an H200's host has", () => {
    // 97 blocks of 32 MiB took 2.17 s; a step takes 0.109 s
    const { missing, waits } = prepared(149, 0.109, 22.4);
    expect(missing).toBe(0);
    expect(Math.max(...waits)).toBeLessThanOrEqual(PREPARING * 109);
  });

  test("takes one block in a step that is shorter than a block", () => {
    expect(prepared(20, 0.01, 22)).toEqual({ missing: 398 - 20, waits: Array.from({ length: 20 }, () => 22) });
  });
});

describe("--keep", () => {
  test("removes older checkpoints when the new one is complete, and none of another name", async () => {
    mkdirSync(join(folder, "step-notes"), { recursive: true });
    const saver = saverWith({ threads: 0, keep: 2 });
    for (const step of [1, 2, 3, 4]) await (await saver.begin(progress(step))).done;
    expect(readdirSync(folder).sort()).toEqual(["step-00000003", "step-00000004", "step-notes"]);
    for (const name of ["step-00000003", "step-00000004"]) expectComplete(join(folder, name));
    await saver.close();
  });

  test("removes nothing when the new one is not complete", async () => {
    const saver = saverWith({ threads: 0, keep: 1 });
    await (await saver.begin(progress(1))).done;
    let writes = 0;
    const broken = saverWith({ threads: 0, keep: 1 }, () => (writes++ === 0 ? Number.NaN : 1));
    const { done } = await broken.begin(progress(2));
    await expect(done).rejects.toThrow("values that are NaN or infinite");
    expect(readdirSync(folder)).toEqual(["step-00000001"]);
    for (const each of [saver, broken]) await each.close();
  });
});

/** Local ranks of so many processes, in this one, with barriers among them. */
function processes(n: number): Pick<LocalRanks, "ranks" | "rankDevice" | "meet">[] {
  const barriers = new Map<string, { problem?: string; release: ((problem?: string) => void)[] }>();
  const meet = (name: string, problem?: string): Promise<string | undefined> =>
    new Promise((resolve) => {
      const barrier = barriers.get(name) ?? { release: [] };
      barriers.set(name, barrier);
      barrier.release.push(resolve);
      if (problem !== undefined) barrier.problem ??= problem;
      if (barrier.release.length < n) return;
      barriers.delete(name);
      for (const release of barrier.release) release(barrier.problem);
    });
  return Array.from({ length: n }, (_, rank) => ({ ranks: [rank], rankDevice: () => deviceOf(() => 1), meet }));
}

describe("several processes", () => {
  test("write the same bytes as one process", async () => {
    const one = await saveOnce({ threads: 0 }, `${folder}-one`);
    const savers = processes(4).map((localRanks) => saverWith({ localRanks, threads: 0 }));
    const begun = await Promise.all(savers.map((saver) => saver.begin(progress(1))));
    const [{ folder: at } = { folder: "" }] = await Promise.all(begun.map(({ done }) => done));
    expect(bytesIn(at)).toEqual(one);
  });

  test("one that cannot write fails the checkpoint for all, and the next one succeeds", async () => {
    const savers = processes(4).map((localRanks) => saverWith({ localRanks, threads: 1 }));
    const file = join(folder, "step-00000001.part", "rank-00002.safetensors");
    const begun = savers.map((saver) => saver.begin(progress(1)));
    // a folder takes the place of rank 2's file before the threads have started
    await vi.waitUntil(() => existsSync(file), { interval: 1, timeout: 60_000 });
    rmSync(file);
    mkdirSync(file);
    const ends = await Promise.all(begun.map(async (each) => (await each).done.catch((error: Error) => error)));
    for (const end of ends) expect(end).toBeInstanceOf(SaveFault);
    expect(String(ends[0])).toContain("EISDIR");
    expect(readdirSync(folder)).toEqual([]);
    const again = await Promise.all(savers.map((saver) => saver.begin(progress(2))));
    await Promise.all(again.map(({ done }) => done));
    expect(readdirSync(folder)).toEqual(["step-00000002"]);
    await Promise.all(savers.map((saver) => saver.close()));
  });

  test("a folder that not all hosts share is a clear error", async () => {
    const savers = processes(2).map((localRanks, n) => saverWith({ localRanks, threads: 0, folder: `${folder}-${n}` }));
    const begun = await Promise.all(savers.map((saver) => saver.begin(progress(1))));
    void begun[1]?.done.catch(() => {});
    await expect(begun[0]?.done).rejects.toMatchObject({
      message: expect.stringContaining("files of other ranks are missing: rank-00001.safetensors"),
      fix: "use a --save folder that all hosts share",
    });
  });
});

test("a run that failed does not wait for ranks that never write their part", async () => {
  const [only] = processes(4);
  if (!only) throw new Error("no process");
  const saver = saverWith({ localRanks: only, threads: 0 });
  const { done } = await saver.begin(progress(1));
  void done.catch(() => {});
  const begun = performance.now();
  await saver.close(new Error("the device failed"));
  expect(performance.now() - begun).toBeGreaterThan(3000);
});

test("threads report errors of the file system, and the previous checkpoint stays", async () => {
  const saver = saverWith({ threads: 2, blockBytes: 1024 });
  await (await saver.begin(progress(1))).done;
  const pending = await saver.begin(progress(2));
  rmSync(join(folder, "step-00000002.part"), { recursive: true, force: true });
  await expect(pending.done).rejects.toMatchObject({ message: expect.stringContaining("step-00000002: cannot be written") });
  expect(readdirSync(folder)).toEqual(["step-00000001"]);
  await (await saver.begin(progress(3))).done;
  expectComplete(join(folder, "step-00000003"));
  await saver.close();
});

test("--resume auto skips damaged checkpoints and renames them; a run removes unfinished ones", async () => {
  const saver = saverWith({ threads: 0 });
  for (const step of [1, 2, 3]) await (await saver.begin(progress(step))).done;
  await saver.close();
  mkdirSync(join(folder, "step-00000004.part"));
  truncateSync(join(folder, "step-00000003", "rank-00001.safetensors"), 4000);
  writeFileSync(join(folder, "step-00000002", "snapshot.json"), "{}");
  const { at, notes } = newestCheckpoint(folder, expectComplete);
  expect(at).toBe(join(folder, "step-00000001"));
  expect(notes).toEqual([
    expect.stringContaining("step-00000004.part is unfinished"),
    expect.stringMatching(/step-00000003 is damaged and not used: .*it was cut/),
    expect.stringContaining("step-00000002 is damaged and not used"),
    expect.stringContaining("resumed from"),
  ]);
  const run = await openRun(plan, { baseDir: fixture(""), save: folder, resume: "auto", version: "test" });
  expect(run.progress().steps).toBe(1);
  await run.close();
  expect(readdirSync(folder).sort()).toEqual(["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]);
});

describe.skipIf(noCompiler)(`on CUDA, before a stand-in for the driver${noCompiler}`, () => {
  const stateBytes = (own: Plan): number => stateFiles(own).files.get(0)?.bytes ?? 0;
  test.each([
    ["all of the state", (bytes: number) => 2 * bytes],
    ["a part of the state", (bytes: number) => bytes / 3],
    ["nothing", () => 0],
  ] as const)("a checkpoint has the state of its step while later steps change it; the device has room for %s", async (room, roomFor) => {
    const cuda = await standInRanks();
    const { plan: own, kernels } = asCuda(planOf({ world: 1 }, {}, { precision: "bf16" }));
    cuda.serve(kernels);
    const [ranks] = await cuda.openAll(own);
    if (!ranks?.hostMemory) throw new Error("no pinned memory");
    const device = ranks.rankDevice(0);
    // other work of the process gets turns while a step is captured
    const slow = {
      ...ranks,
      async finish() {
        for (let turns = 0; turns < 20; turns++) await setImmediate();
        await ranks.finish();
      },
    };
    const entries = stateFiles(own).files.get(0)?.entries ?? [];
    const step = (): Promise<boolean[]> =>
      cuda.step([slow], own, ({ dtype, shape }) =>
        dtype === "i32" ? new Int32Array(elementsOf(shape)) : new Float32Array(elementsOf(shape)).fill(1e-2),
      );
    for (const { buffer } of entries)
      device.write(
        buffer,
        0,
        Float32Array.from({ length: elementsOf(buffer.shape) }, (_, i) => ((i % 17) + buffer.id.length) / 700),
      );
    await step();
    // 3 % of the device stay free
    vi.stubEnv("STAND_IN_FREE", String(Math.floor(0.03 * 141 * 2 ** 30 + roomFor(stateBytes(own)))));
    const opened = vi.spyOn(device, "openStaging");
    const saver = new CheckpointSaver({ plan: own, folder, version: "test", localRanks: ranks, threads: 2, blockBytes: 1 << 15 });
    const allocated = vi.spyOn(ranks.hostMemory, "allocate");
    // the first steps of a run wait with blocks for all of the state until they know what the device has room for
    for (let steps = 0; steps < 100; steps++) saver.prepare(0.001);
    const prepared = allocated.mock.calls.length;
    expect(prepared).toBeGreaterThan(0);
    const expected = await Promise.all(entries.map(({ buffer }) => device.read(buffer, 0)));
    cuda.seed(1);
    const { done } = await saver.begin(progress(1));
    // all blocks were there before the save
    expect(allocated).toHaveBeenCalledTimes(prepared);
    // training goes on when the copies are done, not when they are issued; the first copy from the staging area may wait
    expect(cuda.queued()).toBeLessThanOrEqual(2);
    const replayed = [await step(), await step(), await step()].flat();
    const { folder: at } = await done;
    expect(replayed).toEqual([false, true, true]);
    const staged = opened.mock.results[0]?.value?.bytes ?? 0;
    expect(staged / stateBytes(own)).toBeGreaterThanOrEqual(room === "nothing" ? 0 : room.startsWith("all") ? 1 : 0.2);
    expect(staged / stateBytes(own)).toBeLessThanOrEqual(room === "nothing" ? 0 : room.startsWith("all") ? 2 : 0.4);
    const checkpoint = openCheckpoint(at);
    const whole = entries.map(({ name }) => checkpoint.whole(name)?.data ?? new Float32Array());
    checkpoint.close();
    const now = await Promise.all(entries.map(({ buffer }) => device.read(buffer, 0)));
    const changed = (others: readonly HostData[]): string[] =>
      entries.flatMap(({ name }, i) => (sameNumbers(others[i] ?? [], expected[i] ?? []) ? [] : [name]));
    expect(changed(whole)).toEqual([]);
    expect(changed(now)).not.toEqual([]);
    await saver.close();
    await ranks.close();
    vi.unstubAllEnvs();
  });
});

test("the built package starts the threads", async () => {
  const { openBlockWriters } = (await import(
    built("runtime/checkpoint/blockWriter.ts")
  )) as typeof import("../../runtime/checkpoint/blockWriter.ts");
  const writers = openBlockWriters(1);
  const path = join(place, "block");
  writeFileSync(path, "");
  const memory = new SharedArrayBuffer(8);
  new Float32Array(memory).set([1, Number.NaN]);
  const pieces = [{ tensor: "x", dtype: "f32", from: 0, bytes: 8, last: true }] as const;
  const result = await writers.writers[0]?.perform({ kind: "block", path, at: 4, memory, pieces, digestBytes: 4 });
  expect(result?.digests.map(([, part]) => part)).toEqual([0, 1]);
  expect(result?.nonfinite).toEqual([["x", 1]]);
  expect(readFileSync(path).length).toBe(12);
  await writers.close();
});
