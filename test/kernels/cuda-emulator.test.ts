/** The emulator of a GPU: wrong kernels fail, and the errors name the fault. */
import { describe, expect, test } from "vitest";
import { source } from "../../src/codegen/cuda/text.ts";
import type { GeneratedKernel, KernelSpec } from "../../src/codegen/kernelSpec.ts";
import { cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";

/** 64 threads in two blocks, y[64] from a[64] and b[64]; `t` is the thread's number in the grid. */
const bodies = {
  right: "y[t] = a[t] + b[t];",
  reversed: "__shared__ float own[32]; own[threadIdx.x] = a[t]; __syncthreads(); y[t] = own[31 - threadIdx.x];",
  summed: "y[t] = blockSum<32>(a[t]);",
  beyond: "y[t + 1] = a[t];",
  before: "y[int(t) - 1] = a[t];",
  shared: "DYNAMIC_SHARED(float, own); own[threadIdx.x + 1] = a[t]; y[t] = 0;",
  waiting: "if (threadIdx.x < 5) __syncwarp(); y[t] = 0;",
  lanes: "y[t] = threadIdx.x < 16 ? __shfl_sync(0xffffu, a[t], 20) : 0;",
  unordered: "__shared__ float own[32]; own[threadIdx.x] = a[t]; y[t] = own[31 - threadIdx.x];",
  lastWins: "y[t] = 0; if (threadIdx.x == 0) y[0] = blockIdx.x;",
  early:
    "__shared__ __align__(16) float own[128]; copyAsync(sharedAddress(own + 4 * threadIdx.x), a + t / 4 * 4); copyCommit(); y[t] = own[4 * threadIdx.x + t % 4];",
  late: "__shared__ __align__(16) float own[128]; copyAsync(sharedAddress(own + 4 * threadIdx.x), a + t / 4 * 4); copyCommit(); copyWait<0>(); y[t] = own[4 * threadIdx.x + t % 4];",
} as const;
type Name = keyof typeof bodies;

const use = (name: string): KernelSpec => ({
  ...{ op: "add", name, d: {}, size: { a: 64, b: 64, y: 64 }, dtype: { a: "f32", b: "f32", y: "f32" } },
  ...{ accumulates: new Set(), bound: 0, makesRows: false, mayOverflow: false },
});
const made = (name: Name): GeneratedKernel => ({
  source: source(
    use(name),
    `extern "C" __global__ void ${name}(const float* a, const float* b, float* y) { const u32 t = blockIdx.x * 32 + threadIdx.x; ${bodies[name]} }`,
  ),
  launches: [{ entry: name, grid: [2, 1, 1], threads: 32, shared: 128, args: ["a", "b", "y"] }],
});

const a = Float32Array.from({ length: 64 }, (_, i) => i);
const b = new Float32Array(64).fill(1);

const missing = await emulatorMissing();
describe.skipIf(missing)(`the emulator${missing ? ` (skipped: ${missing})` : ""}`, () => {
  const names = Object.keys(bodies) as Name[];
  const emulator = cudaEmulator(names.map((name) => ({ use: use(name), made: made(name) })));
  const run = async (name: Name) => [...(await emulator.run(made(name), use(name), { a, b, y: new Float32Array(64) }, {})).y!];

  test.each([
    ["right", a.map((x) => x + 1)],
    ["reversed", a.map((x) => (x < 32 ? 31 - x : 95 - x))],
    ["summed", a.map((x) => (x < 32 ? 496 : 1520))],
    ["late", a],
  ] as const)("runs a correct kernel: %s", async (name, want) => {
    expect(await run(name)).toEqual([...want]);
  });

  test.each([
    ["beyond", "access at byte 256 of buffer 2, which has 256"],
    ["before", "byte -4 of buffer 2 was written"],
    ["shared", "byte 128 of dynamic shared memory was written"],
    ["waiting", "deadlock: 5 of 32 threads wait"],
    ["lanes", "reads lane 20, which is not in the mask"],
    ["unordered", "y depends on the order of threads or blocks"],
    ["lastWins", "y depends on the order of threads or blocks"],
    // a copy is made no earlier than it is waited for
    ["early", "y depends on the order of threads or blocks"],
  ] as const)("reports the fault: %s", async (name, message) => {
    await expect(run(name)).rejects.toThrow(message);
  });
});
