/** Kernels that run beside collectives, which occupy multiprocessors: they have several thread blocks for each, and compute the same. */
import { expect, test } from "vitest";
import type { OpName } from "../../schemas/opNames.ts";
import { dividedGrid } from "../../src/codegen/cuda/dividedGrid.ts";
import { fitsHopper, hopper } from "../../src/codegen/cuda/gemmHopper.ts";
import type { GeneratedKernel } from "../../src/codegen/kernelSpec.ts";
import { productOf } from "../../src/codegen/matmul.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";
import { specFor } from "../support/productCases.ts";

const MULTIPROCESSORS = 132;

/** Returns the rounds of a kernel whose blocks are given in order to the first multiprocessor that is free, with `occupied` of them taken. */
function roundsOf(blocks: number, tiles: number, occupied: number): number {
  const free = new Float64Array(MULTIPROCESSORS);
  // a collective that is longer than the kernel
  const busy = free.subarray(0, MULTIPROCESSORS - occupied);
  for (let block = 0; block < blocks; block++) {
    const first = busy.indexOf(Math.min(...busy));
    busy[first] = (busy[first] ?? 0) + Math.ceil((tiles - block) / blocks);
  }
  return Math.max(...busy);
}

test("beside a collective, a product takes longer by about the occupied multiprocessors; with one block for each it takes twice as long", () => {
  for (const tiles of [1500, 3000, 7168, 20_000])
    for (const occupied of [16, 32]) {
      const alone = roundsOf(MULTIPROCESSORS, tiles, 0);
      const divided = dividedGrid(MULTIPROCESSORS, tiles, MULTIPROCESSORS);
      expect(roundsOf(MULTIPROCESSORS, tiles, occupied)).toBeGreaterThan(1.8 * alone);
      // the last block begins late by a share at most
      expect(roundsOf(divided, tiles, occupied)).toBeLessThan(1.25 * (MULTIPROCESSORS / (MULTIPROCESSORS - occupied)) * alone);
      expect(roundsOf(divided, tiles, 0)).toBeLessThanOrEqual(1.1 * alone);
    }
});

test("a product with few tiles keeps its grid, and all thread blocks have tiles", () => {
  expect(dividedGrid(126, 126, MULTIPROCESSORS)).toBe(126);
  expect(dividedGrid(MULTIPROCESSORS, 3 * MULTIPROCESSORS, MULTIPROCESSORS)).toBe(MULTIPROCESSORS);
  for (let tiles = MULTIPROCESSORS; tiles < 20_000; tiles += 97)
    expect(dividedGrid(MULTIPROCESSORS, tiles, MULTIPROCESSORS)).toBeLessThanOrEqual(tiles);
});

const textOf = ({ source }: GeneratedKernel, name: string): string => source.replaceAll(name, "kernel");

test("the kernel of a product beside collectives differs from the other in its grid alone; weight gradients of experts take no tickets", () => {
  const made = (op: OpName, d: Record<string, number>, bound: number, shares: boolean): GeneratedKernel => {
    const small = specFor("shared", op, { S: 8, K: 8, N: 8, ...(bound ? { rows: [8] } : {}) }, "bf16");
    const spec = { ...small, bound, d: { ...small.d, ...d }, ...(shares && { sharesDevice: true as const }) };
    const product = productOf(spec);
    expect(fitsHopper(product)).toBe(true);
    return hopper(spec, product, "bf16");
  };
  const [own, shared] = [false, true].map((shares) => made("gemm", { S: 16_384, K: 14_336, N: 4096 }, 0, shares));
  expect(textOf(shared!, "shared")).toBe(textOf(own!, "shared"));
  expect([own!.launches[0]!.grid[0], shared!.launches[0]!.grid[0]! % MULTIPROCESSORS]).toEqual([MULTIPROCESSORS, 0]);
  expect(shared!.launches[0]!.grid[0]).toBeGreaterThan(3 * MULTIPROCESSORS);
  const [tickets, shares] = [false, true].map((beside) => made("grouped_wgrad", { K: 4096, N: 14_336, E: 8 }, 16_384, beside));
  expect([tickets!.launches.length, shares!.launches.length]).toEqual([2, 1]);
  expect(shares!.launches[0]!.grid[0]).toBeGreaterThan(3 * MULTIPROCESSORS);
});

test("products of blocks that begin asynchronous collectives share the device, those of other blocks and of stages that only send do not", async () => {
  const job = (parallel: object) =>
    jobOf({
      name: "shared-device",
      model: { layers: 2, hidden: 4096, heads: 32, kv_heads: 8, ffn: 14_336, vocab: 4096, seq: 4096 },
      train: { precision: "bf16", micro_batch: 2, global_batch: 4, steps: 1, optimizer: { type: "adamw", lr: 1e-3 } },
      data: { path: "ids.bin" },
      parallel: { world: 2, ...parallel },
    });
  const gridsOf = (parallel: object, target: Awaited<ReturnType<typeof loadTarget>>) => {
    const { plan } = compile(job(parallel), { target });
    const grids = new Map(plan.kernels.map(({ id, launches }) => [id, launches[0]?.grid[0] ?? 0]));
    const [chunk] = plan.programs[0]!.chunks;
    const most = (block: "forward" | "backward", op: string): number =>
      Math.max(...chunk![block].map((i) => (i.kind === "compute" && i.op.startsWith(op) ? (grids.get(i.kernel) ?? 0) : 0)));
    return { forward: most("forward", "gemm"), backward: most("backward", "gemm"), attention: most("forward", "attention") };
  };
  const hopperTarget = await loadTarget("cuda:sm_90a");
  expect(gridsOf({}, hopperTarget)).toEqual({ forward: MULTIPROCESSORS, backward: MULTIPROCESSORS, attention: MULTIPROCESSORS });
  const buckets = gridsOf({ gradient_bucket: 100 }, hopperTarget);
  expect(buckets.forward).toBe(MULTIPROCESSORS);
  expect(buckets.backward).toBeGreaterThan(3 * MULTIPROCESSORS);
  const staged = gridsOf({ pipeline: 2 }, hopperTarget);
  for (const grid of Object.values(staged)) expect(grid).toBeLessThanOrEqual(MULTIPROCESSORS);
  const gathered = gridsOf({ distributed_optimizer: true, parameter_bucket: 50, parameter_gather: "forward" }, hopperTarget);
  expect(gathered.forward).toBeGreaterThan(3 * MULTIPROCESSORS);
  expect(gathered.attention).toBeGreaterThan(MULTIPROCESSORS);
  expect(gathered.backward).toBe(MULTIPROCESSORS);
});
