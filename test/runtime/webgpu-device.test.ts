/** The WebGPU backend on kernels written by hand: memory, order, arguments and times; and its errors. */
import { spawn } from "node:child_process";
import { describe, expect, test } from "vitest";
import { cutArena, shareBuffers } from "../../runtime/webgpu/arenas.ts";
import type { Sources, WebgpuRanks, WebgpuSettings } from "../../runtime/webgpu/backend.ts";
import { openWebgpu } from "../../runtime/webgpu/dawn.ts";
import type { Compute, Kernel, Launch, Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type KernelArg, neededRows, planLaunch, rowIndex, scratch, startOf } from "../../src/codegen/launchArgs.ts";
import { bufferIn, handPlan } from "../support/handPlan.ts";
import { built } from "../support/rankc.ts";
import { adapterEnv, hardware, noAdapter, noHalves } from "../support/softwareAdapter.ts";

const binding = (n: number, name: string, type = "f32") => `@group(0) @binding(${n}) var<storage, read_write> ${name}: array<${type}>;\n`;
const scaled = (by: number) => `${binding(0, "x")}${binding(1, "y")}
@compute @workgroup_size(64) fn scale(@builtin(global_invocation_id) at: vec3u) {
  if (at.x < arrayLength(&y)) { y[at.x] = ${by}.0 * x[at.x] + y[at.x]; }
}`;
const launch = (entry: string, args: KernelArg[], grid: [number, number, number] = [1, 1, 1]): Launch =>
  planLaunch({ entry, grid, threads: 64, shared: 0, args });
const kernelOf = (id: string, launches: Launch[], scratch = 0): Kernel => ({
  ...{ id, op: "add", dtypes: "", sizes: {}, attrs: {}, uses: 1, scratch, launches },
  source: { file: `${id}.wgsl`, sha256: "" },
});
const compute = (id: string, kernel: string, reads: Compute["reads"], writes: Compute["writes"], dims: Compute["dims"] = {}): Compute => ({
  ...{ kind: "compute", id, op: "add", kernel, reads, writes, dims, attrs: {} },
});
const sourcesOf = (texts: Readonly<Record<string, string>>): Sources => ({ kernel: (file) => texts[file.replace(".wgsl", "")]! });

async function using<T>(
  plan: Plan,
  texts: Readonly<Record<string, string>>,
  work: (localRanks: WebgpuRanks) => Promise<T>,
  settings: WebgpuSettings = {},
): Promise<T> {
  const localRanks = await openWebgpu(plan, sourcesOf(texts), settings);
  try {
    return await work(localRanks);
  } finally {
    await localRanks.close();
  }
}
const troubleOf = async (work: Promise<unknown>): Promise<Trouble> => {
  const error = await work.then(
    () => undefined,
    (e: unknown) => e,
  );
  expect(error).toBeInstanceOf(Trouble);
  return error as Trouble;
};
const read = async (localRanks: WebgpuRanks, plan: Plan, rank: number, id: string, copy = 0): Promise<number[]> => [
  ...(await localRanks.rankDevice(rank).read(bufferIn(plan, id), copy)),
];
const reason = noAdapter ? `: skipped, ${noAdapter}` : "";

/** y += 2x, in one buffer each. */
const add = compute("layers.0.add", "scale", { x: "x" }, { y: "y" });
const addPlan = (elements: number, more: Partial<Parameters<typeof handPlan>[0]> = {}) =>
  handPlan({
    buffers: { x: { shape: [elements] }, between: { shape: [elements] }, y: { kind: "gradient", shape: [elements] } },
    kernels: [kernelOf("scale", [launch("scale", ["x", "y"], [Math.ceil(elements / 64), 1, 1])])],
    forward: [add],
    ...more,
  });

describe.skipIf(noAdapter)(`the backend${reason}`, () => {
  test("commands run in order: writes, dispatches, clears, reads", async () => {
    const plan = addPlan(5);
    await using(plan, { scale: scaled(2) }, async (localRanks) => {
      const b = localRanks.rankDevice(0);
      const x = bufferIn(plan, "x");
      const seen: Promise<number[]>[] = [];
      b.write(x, 0, Float32Array.of(1, 2, 3, 4, 5));
      b.compute(add, 0);
      seen.push(read(localRanks, plan, 0, "y"));
      b.write(x, 0, Float32Array.of(10, 10, 10, 10, 10));
      b.compute(add, 0);
      seen.push(read(localRanks, plan, 0, "y"));
      b.zeroGradients();
      b.compute(add, 0);
      seen.push(read(localRanks, plan, 0, "y"));
      expect(await Promise.all(seen)).toEqual([
        [2, 4, 6, 8, 10],
        [22, 24, 26, 28, 30],
        [20, 20, 20, 20, 20],
      ]);
      await localRanks.finish();
    });
  });

  test("more writes than fit in flight, small and large, stay in order", async () => {
    const plan = addPlan(100_000);
    await using(plan, { scale: scaled(1) }, async (localRanks) => {
      const b = localRanks.rankDevice(0);
      // past half of the bytes in flight at the third
      for (let i = 1; i <= 12; i++) {
        b.write(bufferIn(plan, "x"), 0, new Float32Array(i % 3 ? 60_000 : 100_000).fill(i));
        b.compute(add, 0);
      }
      const y = await read(localRanks, plan, 0, "y");
      expect([y[0], y[59_999], y[60_000], y[99_999]]).toEqual([78, 78, 3 * 3 + 6 * 3 + 9 * 3 + 12, 3 * 3 + 6 * 3 + 9 * 3 + 12]);
    });
  });

  test("ranks and activation copies have separate memory; unwritten memory is zero", async () => {
    const plan = addPlan(3, {
      world: 2,
      copies: 2,
      buffers: { x: { kind: "activation", shape: [3] }, y: { kind: "activation", shape: [3] } },
    });
    await using(plan, { scale: scaled(1) }, async (localRanks) => {
      for (const rank of localRanks.ranks)
        for (const copy of [0, 1]) {
          localRanks.rankDevice(rank).write(bufferIn(plan, "x"), copy, Float32Array.of(rank, copy, 7));
          if (rank + copy < 2) localRanks.rankDevice(rank).compute(add, copy);
        }
      const all = await Promise.all(
        localRanks.ranks.flatMap((r) => [read(localRanks, plan, r, "y", 0), read(localRanks, plan, r, "y", 1)]),
      );
      expect(all).toEqual([
        [0, 0, 7],
        [0, 1, 7],
        [1, 0, 7],
        [0, 0, 0],
      ]);
    });
  });

  test("launches in order, parts of the scratch arena, where a rank's piece begins, rows and how many were needed", async () => {
    const source = `${binding(0, "x")}${binding(1, "low")}${binding(2, "high")}
@compute @workgroup_size(1) fn first() {
  low[0] = f32(arrayLength(&low));
  high[0] = f32(arrayLength(&high)) + x[0];
}
@group(0) @binding(0) var<storage, read_write> rows: array<i32>;
@group(0) @binding(1) var<storage, read_write> needed: array<i32>;
@group(0) @binding(2) var<storage, read_write> both: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
struct Starts { B: i32, S: i32, }
@group(0) @binding(4) var<uniform> starts: Starts;
@compute @workgroup_size(1) fn second() {
  rows[0] = 3;
  needed[0] = 4 + starts.B;
  y[0] = both[0];
  y[1] = both[64];
  y[2] = f32(starts.B);
  y[3] = f32(starts.S);
}`;
    const launches = [
      launch("first", ["x", scratch(0), scratch(256)]),
      launch("second", [rowIndex, neededRows, scratch(0), "y", startOf("B"), startOf("S")]),
    ];
    const i = { ...compute("i", "two", { x: "x" }, { y: "y" }, { B: [6, [0]], S: [9, []] }), rows: "index" };
    const plan = handPlan({
      world: 2,
      buffers: {
        x: { shape: [1] },
        y: { shape: [4], ragged: 1, rows: "index" },
        index: { dtype: "i32", shape: [13] },
        "index.needed": { kind: "gradient", dtype: "i32", shape: [] },
      },
      kernels: [kernelOf("two", launches, 768)],
      bounds: [{ needed: "index.needed", bound: 6 }],
    });
    await using(plan, { two: source }, async (localRanks) => {
      for (const r of localRanks.ranks) {
        localRanks.rankDevice(r).write(bufferIn(plan, "x"), 0, Float32Array.of(0.5));
        localRanks.rankDevice(r).compute(i, 0);
      }
      expect(await read(localRanks, plan, 0, "y")).toEqual([64, 128.5, 0, 0]);
      expect(await read(localRanks, plan, 1, "y")).toEqual([64, 128.5, 3, 0]);
      expect((await read(localRanks, plan, 1, "index"))[0]).toBe(3);
      const overflow = await troubleOf(localRanks.finish());
      expect(overflow.message).toContain("index.needed, rank 1: the router sent 7 rows, and the plan holds at most 6");
      expect(overflow.fix).toContain("model.moe.rows_bound");
    });
  });

  test("an arena above the device's limit is cut between buffers, and nothing else changes", async () => {
    const plan = addPlan(300);
    await using(
      plan,
      { scale: scaled(3) },
      async (localRanks) => {
        localRanks.rankDevice(0).write(bufferIn(plan, "x"), 0, new Float32Array(300).fill(2));
        localRanks.rankDevice(0).write(bufferIn(plan, "between"), 0, new Float32Array(300).fill(-1));
        localRanks.rankDevice(0).compute(add, 0);
        expect(await read(localRanks, plan, 0, "y")).toEqual(Array(300).fill(6));
        expect(await read(localRanks, plan, 0, "between")).toEqual(Array(300).fill(-1));
      },
      { limits: { buffer: 1536 } },
    );
  });

  test("every dispatch is timed on request, in order", async () => {
    const plan = addPlan(1000);
    await using(
      plan,
      { scale: scaled(1) },
      async (localRanks) => {
        for (let n = 0; n < 3000; n++) localRanks.rankDevice(0).compute(add, 0);
        const times = await localRanks.profile();
        expect(times).toHaveLength(3000);
        expect(times[7]).toMatchObject({ rank: 0, stream: "compute", id: "layers.0.add", op: "add", kernel: "scale" });
        for (const [n, t] of times.entries()) {
          expect(t.end_us).toBeGreaterThanOrEqual(t.begin_us);
          if (n) expect(t.begin_us).toBeGreaterThanOrEqual(times[n - 1]!.begin_us);
        }
        expect(await localRanks.profile()).toEqual([]);
      },
      { profile: true },
    );
  });
});

describe("an arena is split", () => {
  const held = (...ranges: [number, number][]) => ranges.map(([from, to], i) => ({ id: `b${i}`, from, to }));
  test("into the fewest parts, at boundaries of buffers", () => {
    expect(cutArena(held([0, 4], [4, 8], [8, 12]), 12, 12, "")).toEqual([0]);
    expect(cutArena(held([0, 4], [4, 8], [8, 12]), 12, 8, "")).toEqual([0, 8]);
    expect(cutArena(held([8, 12], [0, 4], [4, 8]), 12, 4, "")).toEqual([0, 4, 8]);
    // two buffers in one place at different times
    expect(cutArena(held([0, 4], [4, 10], [4, 6], [6, 8], [10, 12]), 12, 8, "")).toEqual([0, 4]);
    expect(cutArena([], 0, 8, "")).toEqual([]);
  });
  test("or not, if no boundary exists", () => {
    const cut = () => cutArena(held([0, 4], [2, 8], [6, 12]), 12, 8, "the workspace arena of stage 1 on X");
    expect(cut).toThrow("the workspace arena of stage 1 on X has 12 bytes; its buffers up to b2 lie in one piece");
  });
  test("and parts share the fewest GPUBuffers", () => {
    const shared = (limit: number) =>
      shareBuffers([{ bytes: 4 }, { bytes: 8 }, { bytes: 4 }, { bytes: 4 }], limit).map((parts) => parts.length);
    expect(shared(20)).toEqual([4]);
    expect(shared(12)).toEqual([2, 2]);
    expect(shared(8)).toEqual([1, 1, 2]);
  });
});

describe.skipIf(noAdapter)(`errors${reason}`, () => {
  test("a plan for another target", async () => {
    const trouble = await troubleOf(openWebgpu(addPlan(1, { target: "cuda:sm_90a" }), sourcesOf({})));
    expect(trouble.message).toContain("cuda:sm_90a");
  });

  test.skipIf(!noHalves)("a profile that the adapter lacks: the feature by name, and the profile it has", async () => {
    const f16 = await troubleOf(openWebgpu(addPlan(1, { target: "webgpu:f16" }), sourcesOf({})));
    expect(f16.exit).toBe(3);
    expect(f16.message).toMatch(/the plan is for webgpu:f16, and the adapter .* has no shader-f16/i);
    expect(f16.fix).toContain("webgpu:baseline");
    const matrix = await troubleOf(openWebgpu(addPlan(1, { target: "webgpu:matrix" }), sourcesOf({})));
    expect(matrix.exit).toBe(3);
    expect(matrix.message).toContain("chromium-experimental-subgroup-matrix");
  });

  test("a buffer above the binding limit: its name, its size, the limit", async () => {
    const trouble = await troubleOf(openWebgpu(addPlan(1000), sourcesOf({ scale: scaled(1) }), { limits: { binding: 2048 } }));
    expect(trouble.exit).toBe(3);
    expect(trouble.message).toMatch(/the buffer x of stage 0 has 4000 bytes; kernels on .* see at most 2048/);
  });

  test("an arena that can be neither allocated nor split", async () => {
    const trouble = await troubleOf(openWebgpu(addPlan(1000), sourcesOf({ scale: scaled(1) }), { limits: { buffer: 2048 } }));
    expect(trouble.exit).toBe(3);
    expect(trouble.message).toContain("maxBufferSize");
  });

  test("a kernel that does not compile: kernel, op, file, line", async () => {
    const broken = scaled(1).replace("y[at.x] =", "z[at.x] =");
    const trouble = await troubleOf(openWebgpu(addPlan(1), sourcesOf({ scale: broken })));
    expect(trouble.exit).toBe(3);
    expect(trouble.message).toMatch(/kernel scale of add \(kernels\/scale\.wgsl\) does not compile .*line 5:\d+: unresolved value 'z'/);
    const nameless = await troubleOf(openWebgpu(addPlan(1), sourcesOf({ scale: scaled(1).replace("fn scale", "fn other") })));
    expect(nameless.message).toContain("scale");
  });

  test("a command that WebGPU refuses: which one", async () => {
    // both operands in the same bytes, and one of them written
    const same = compute("layers.1.add", "scale", { x: "x" }, { y: "x" });
    const plan = addPlan(4);
    await using(plan, { scale: scaled(1) }, async (localRanks) => {
      localRanks.rankDevice(0).compute(same, 0);
      await expect(localRanks.finish()).rejects.toThrow(/layers\.1\.add, rank 0/);
      await expect(localRanks.finish()).rejects.toThrow(/layers\.1\.add, rank 0/);
    });
  });

  test("a device is lost during a run", async () => {
    const plan = addPlan(1000);
    await using(plan, { scale: scaled(1) }, async (localRanks) => {
      const b = localRanks.rankDevice(0);
      for (let n = 0; n < 100; n++) b.compute(add, 0);
      const pending = localRanks.rankDevice(0).read(bufferIn(plan, "y"), 0);
      localRanks.device.destroy();
      for (let n = 0; n < 1000; n++) b.compute(add, 0);
      for (const trouble of await Promise.all([pending, localRanks.finish(), read(localRanks, plan, 0, "y")].map(troubleOf))) {
        expect(trouble.exit).toBe(3);
        expect(trouble.message).toMatch(/the GPU .* was lost: /);
        expect(trouble.fix).toContain("checkpoint");
      }
    });
  });

  test.skipIf(hardware)("missing memory", async () => {
    // 512 GiB, 1 GiB at a time: as much as the software adapter makes in one piece
    const buffers = Object.fromEntries(Array.from({ length: 64 }, (_, i) => [`w${i}`, { kind: "parameter" as const, shape: [2 ** 28] }]));
    const plan = handPlan({ world: 8, buffers });
    const trouble = await troubleOf(openWebgpu(plan, sourcesOf({})));
    expect(trouble.exit).toBe(3);
    expect(trouble.message).toMatch(/out of memory: no room for \d+ bytes, rank \d parameter part \d+/);
  });
});

describe.skipIf(noAdapter)(`a process${reason}`, () => {
  const script = (body: string) =>
    `import { openWebgpu } from ${JSON.stringify(built("runtime/webgpu/dawn.ts"))}; import { handPlan } from ${JSON.stringify(built("test/support/handPlan.ts"))};\n${body}`;
  const run = (body: string, env: NodeJS.ProcessEnv): Promise<{ exit: number | null; out: string; err: string }> => {
    const child = spawn(process.execPath, ["--input-type=module", "-e", script(body)], { env });
    const printed = { out: "", err: "" };
    child.stdout.on("data", (chunk) => (printed.out += chunk));
    child.stderr.on("data", (chunk) => (printed.err += chunk));
    return new Promise((resolve) => child.on("close", (exit) => resolve({ exit, ...printed })));
  };
  const open = `const plan = handPlan({ buffers: { x: { shape: [4] } } }); const fleet = await openWebgpu(plan, { kernel: () => "" });`;

  test("ends after its local ranks are closed", async () => {
    const printed = await run(`${open} await fleet.finish(); await fleet.close(); console.log("closed");`, adapterEnv);
    expect(printed).toMatchObject({ exit: 0, out: "closed\n" });
  });

  test("without an adapter prints what to install, and ends", async () => {
    // a driver that is not there; on the machine's own adapters nothing can be hidden
    const env = { ...adapterEnv, VK_DRIVER_FILES: "/nowhere.json", VK_ICD_FILENAMES: "/nowhere.json" };
    const printed = await run(`try { ${open} } catch (e) { console.log(e.exit, e.message, e.fix); }`, env);
    expect(printed.exit).toBe(0);
    expect(printed.out).toMatch(/^3 no WebGPU adapter: .*Vulkan.* install /s);
  });
});
