/** Kernels of a plan before a stand-in for the driver: where their cubins come from. What needs NVRTC says so when it is skipped. */
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import { nvrtcVersion } from "../runtime/cuda/nvrtc.ts";
import type { Kernel, Plan } from "../schemas/plan.ts";
import { failure } from "./cudaRanks.ts";
import { noCompiler, type StandIn, standIn } from "./cudaStandIn.ts";
import { handPlan } from "./handPlan.ts";

const noNvrtc: string = (() => {
  try {
    nvrtcVersion();
    return "";
  } catch (error) {
    return ` [skipped: ${(error as Error).message.split(/[;\n]/)[0]}]`;
  }
})();
const nvrtc = process.env.RANKC_LIBNVRTC;
const cache = mkdtempSync(join(tmpdir(), "rankc-cubins-"));
afterAll(() => rmSync(cache, { recursive: true }));

let cuda: StandIn;
beforeAll(async () => {
  if (!noCompiler) cuda = await standIn();
});
afterEach(() => vi.stubEnv("RANKC_LIBNVRTC", nvrtc));
afterAll(() => vi.unstubAllEnvs());

/** A plan whose one rank uses kernels of these ids, each with the stand-in's own function. */
const planOf = (...ids: readonly string[]): Plan =>
  handPlan({
    target: "cuda:sm_90a",
    buffers: { a: { shape: [8] } },
    forward: ids.map((id) => ({
      ...{ kind: "compute", id, op: "add", kernel: id, reads: {}, writes: { a: "a" }, dims: {}, attrs: {} },
    })),
    kernels: [...ids, "unused"].map(
      (id): Kernel => ({
        ...{ id, op: "add", dtypes: "f32.f32", dims: {}, uses: 1, scratch: 0 },
        source: { file: `${id}.cu`, sha256: "ab".repeat(32) },
        launches: [{ entry: "add", grid: [1, 1, 1], threads: 32, shared: 0, args: ["a", "a", "a"] }],
      }),
    ),
  });
async function opened(plan: Plan, source: (file: string) => string, cubin?: (file: string) => Uint8Array | undefined): Promise<void> {
  const share = async (_: string, __: readonly number[], make: () => Uint8Array) => make();
  const fleet = await cuda.openCuda(plan, { rank: 0, device: 0, files: { source, ...(cubin ? { cubin } : {}) }, share });
  await fleet.close();
}
const noSource = (file: string): string => expect.fail(`${file} was read`);

describe.skipIf(noCompiler)(`cubins${noCompiler}`, { timeout: 60_000 }, () => {
  test("those beside the plan are taken, by a name that has the source's digest and the architecture; unused ones are not", async () => {
    const asked: string[] = [];
    await opened(planOf("one", "two"), noSource, (file) => {
      asked.push(file);
      return Uint8Array.from([0x7f, 0x45, 0x4c, 0x46, 2]);
    });
    expect(asked.sort()).toEqual(["one.abababababababab.sm_90a.cubin", "two.abababababababab.sm_90a.cubin"]);
  });

  test("what is no cubin, or lacks the function, says which kernel", async () => {
    expect(await failure(opened(planOf("one"), noSource, () => Uint8Array.from([1, 2, 3, 4, 5])))).toMatchObject({
      message: "kernel one (add in f32.f32): cuModuleLoadData: CUresult 200: CUresult 200",
    });
    const other = new TextEncoder().encode("\x7fELF\nsubtract\n\0");
    expect(await failure(opened(planOf("one"), noSource, () => other))).toMatchObject({
      message: "kernel one (add in f32.f32): cuModuleGetFunction: CUDA_ERROR_NOT_FOUND: named symbol not found",
    });
  });

  test("without a cubin and without NVRTC it is trouble that names the library", async () => {
    vi.stubEnv("XDG_CACHE_HOME", cache);
    vi.stubEnv("RANKC_LIBNVRTC", "/nowhere/libnvrtc.so.13");
    cuda = await standIn();
    expect(await failure(opened(planOf("one"), () => "no source"))).toMatchObject({
      name: "Trouble",
      exit: 3,
      message: expect.stringContaining("/nowhere/libnvrtc.so.13"),
    });
  });
});

describe.skipIf(noCompiler || noNvrtc)(`sources, compiled by NVRTC and kept${noCompiler}${noNvrtc}`, { timeout: 60_000 }, () => {
  const source = (of: string) => `extern "C" __global__ void add(float* a, float* b, float* c) { c[threadIdx.x] = ${of}; }\n`;
  beforeAll(() => vi.stubEnv("XDG_CACHE_HOME", cache));

  test("a source is compiled once for each of its texts", async () => {
    const files = () => readdirSync(join(cache, "rankc", "cubin"));
    const [one, two] = [source("1.0f"), source("2.0f")];
    await opened(planOf("one", "two"), (file) => (file === "one.cu" ? one : two));
    const kept = files();
    expect(kept.length).toBe(2);
    expect(kept.every((name) => /^[0-9a-f]{64}\.cubin$/.test(name))).toBe(true);
    await opened(planOf("one", "two"), (file) => (file === "one.cu" ? two : one));
    expect(files().sort()).toEqual(kept.sort());
    await opened(planOf("one"), () => source("3.0f"));
    expect(files().length).toBe(3);
  });

  test("what does not compile says which kernel, and its line", async () => {
    expect(await failure(opened(planOf("one"), () => `\n${source("d")}`))).toMatchObject({
      name: "Error",
      message: expect.stringMatching(
        /^kernel one \(add in f32\.f32\): NVRTC \S+ cannot compile one\.cu for sm_90a:\none\.cu\(2\): error: identifier "d" is undefined/,
      ),
    });
  });

  test("a cache that cannot be written is done without", async () => {
    vi.stubEnv("XDG_CACHE_HOME", "/dev/null");
    await opened(planOf("one"), () => source("4.0f"));
    vi.stubEnv("XDG_CACHE_HOME", cache);
  });
});
