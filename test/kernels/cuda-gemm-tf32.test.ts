/**
 * Products in TF32 on Hopper equal their reference, which rounds the same operands: with every tile, in both orders of a and of b, per expert, in parts of
 * the depth, and as sums of products; copies, barriers, swizzles and products of warpgroups emulated as PTX documents them.
 */
import { describe, expect, test } from "vitest";
import type { OpName } from "../../schemas/opNames.ts";
import { fitsTf32, type Tf32Tiling, tf32, tf32Tiling } from "../../src/codegen/cuda/gemmTf32.ts";
import type { GeneratedKernel } from "../../src/codegen/kernelSpec.ts";
import { productOf } from "../../src/codegen/matmul.ts";
import type { ContractCase } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { cudaDevice, firstGpu } from "../support/cudaDevice.ts";
import { cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { random } from "../support/opCases.ts";
import { caseOf, type Sizes, specFor, sumCaseOf } from "../support/productCases.ts";
import { full } from "../support/tiers.ts";

interface Held extends ContractCase {
  readonly made: GeneratedKernel;
}
const missing = await emulatorMissing();
const emulated = describe.skipIf(missing);

async function holdAll(cases: readonly Held[]): Promise<void> {
  const executor = cudaEmulator(cases);
  const failed: string[] = [];
  for (const c of cases) await hold(executor, c.made, c).catch((error) => failed.push(String(error.message)));
  expect(failed).toEqual([]);
}

const small = { rows: 128, columns: 128 } as const;
const high = { rows: 256, columns: 128 } as const;
const large = { rows: 256, columns: 192 } as const;

/** Two blocks for all tiles, so that each walks over several. */
const tiled = (c: ContractCase, change: Partial<Tf32Tiling>): Held => {
  const p = productOf(c.use);
  return {
    ...c,
    made: tf32(c.use, p, { tile: small, stages: 2, parts: 1, divided: 0, prepared: false, blocks: 2, ...change }),
  };
};
const held = (name: string, op: OpName, sizes: Sizes, adds: boolean, change: Partial<Tf32Tiling>): Held =>
  tiled(caseOf(name, op, { ...sizes, tf32: 1 }, "f32", adds), change);

const rows = [130, 0, 17, 128, 1, 70];
const sum = (name: string, op: OpName, sizes: Parameters<typeof sumCaseOf>[2], change: Partial<Tf32Tiling> = {}): Held =>
  tiled(sumCaseOf(name, op, { ...sizes, tf32: 1 }, "f32"), change);
const groups: readonly { readonly title: string; readonly cases: () => Held[]; readonly isFast?: true }[] = [
  {
    title: "a weight gradient per expert that is added: both operands change their order",
    cases: () => [held("g0", "grouped_wgrad", { K: 136, N: 68, rows }, true, { stages: 3 })],
    isFast: true,
  },
  {
    title: "dense: one tile and several, remainders in every dim, addition to existing values",
    cases: () => [
      held("a0", "gemm", { S: 128, K: 32, N: 128 }, false, {}),
      held("a1", "gemm", { S: 300, K: 76, N: 200 }, false, { stages: 3 }),
      held("a2", "gemm_dgrad", { S: 300, K: 133, N: 76 }, false, {}),
      held("a3", "gemm_wgrad", { S: 150, K: 136, N: 140 }, false, {}),
      held("a4", "gemm_wgrad", { S: 150, K: 136, N: 140 }, true, { stages: 5 }),
      held("a5", "gemm", { S: 3, K: 4, N: 4 }, false, { stages: 6 }),
      held("a8", "gemm_dgrad", { S: 130, K: 134, N: 76 }, false, {}),
    ],
  },
  {
    title: "every tile, in every order of operands",
    cases: () => [
      held("t0", "gemm", { S: 300, K: 68, N: 136 }, false, { tile: high }),
      held("t1", "gemm_dgrad", { S: 260, K: 70, N: 36 }, false, { tile: high }),
      held("t2", "gemm_wgrad", { S: 70, K: 264, N: 136 }, true, { tile: high, stages: 3 }),
      held("t3", "gemm", { S: 260, K: 68, N: 200 }, false, { tile: large, stages: 3 }),
      held("t4", "gemm_dgrad", { S: 260, K: 200, N: 36 }, false, { tile: large, stages: 3 }),
      held("t5", "gemm_wgrad", { S: 70, K: 264, N: 200 }, false, { tile: large }),
    ],
  },
  {
    title: "per expert: experts without rows, with few and with several tiles",
    cases: () => [
      held("g1", "grouped_gemm", { K: 72, N: 136, rows }, false, {}),
      held("g2", "grouped_dgrad", { K: 136, N: 72, rows }, false, { tile: large }),
      held("g3", "grouped_wgrad", { K: 136, N: 200, rows }, false, { tile: large }),
      held("g4", "grouped_gemm", { K: 64, N: 64, rows: [0, 0, 0] }, false, {}),
      held("g5", "grouped_wgrad", { K: 64, N: 64, rows: [0, 0, 0] }, false, {}),
    ],
  },
  {
    title: "the last tiles divided among all thread blocks: with pieces of one tile and of two, whole tiles and shares that are empty",
    cases: () => [
      // four tiles of 5 steps, two of them divided: shares of 4, 4 and 2 steps
      held("d0", "gemm", { S: 256, K: 160, N: 256 }, false, { divided: 2, blocks: 3 }),
      held("d1", "gemm_dgrad", { S: 300, K: 133, N: 132 }, false, { divided: 5, blocks: 7 }),
      held("d2", "gemm_wgrad", { S: 150, K: 264, N: 200 }, true, { divided: 1, blocks: 3, tile: large }),
      // shares of one step, blocks without one
      held("d3", "gemm_wgrad", { S: 90, K: 132, N: 132 }, false, { divided: 1, blocks: 5, tile: high }),
      sum("d4", "gemm_dgrad_pair", { S: 140, K: 133, depths: [36, 68] }, { divided: 3, blocks: 4 }),
    ],
  },
  {
    title: "b rounded by a launch before, in every order of operands, per expert, divided and in parts",
    cases: () => [
      held("r0", "gemm", { S: 300, K: 76, N: 200 }, false, { prepared: true, tile: large }),
      held("r1", "gemm_dgrad", { S: 300, K: 133, N: 76 }, false, { prepared: true, stages: 3 }),
      held("r2", "gemm_wgrad", { S: 150, K: 136, N: 140 }, true, { prepared: true, tile: high }),
      held("r3", "gemm", { S: 256, K: 160, N: 260 }, false, { prepared: true, divided: 2, blocks: 3 }),
      held("r4", "gemm_wgrad", { S: 300, K: 136, N: 140 }, true, { prepared: true, parts: 3, blocks: 5 }),
      held("r5", "grouped_gemm", { K: 72, N: 136, rows }, false, { prepared: true }),
      sum("r6", "grouped_dgrad_pair", { K: 70, depths: [36, 68], rows }, { prepared: true, tile: large }),
      sum("r7", "gemm_dgrad_triple", { S: 140, K: 133, depths: [36, 68, 32] }, { prepared: true, divided: 3, blocks: 4 }),
    ],
  },
  {
    title: "parts of the depth, and sums of products with depths that end within a step",
    cases: () => [
      held("p0", "gemm_wgrad", { S: 300, K: 136, N: 140 }, true, { parts: 3, blocks: 5 }),
      held("p1", "gemm", { S: 130, K: 100, N: 36 }, false, { parts: 2, blocks: 5 }),
      sum("s0", "gemm_dgrad_pair", { S: 140, K: 133, depths: [36, 68] }),
      sum("s1", "gemm_dgrad_triple", { S: 140, K: 72, depths: [36, 68, 32] }),
      sum("s2", "grouped_dgrad_pair", { K: 72, depths: [36, 68], rows }),
    ],
  },
];

emulated(`Hopper's products in TF32${missing ? ` (skipped: ${missing})` : ""}`, () => {
  for (const { title, cases, isFast } of groups) test(title, isFast ? {} : full, () => holdAll(cases()));
  test("b as it is, of which tensor cores ignore the last 13 bits, differs from the reference", async () => {
    const c = held("truncated", "gemm_dgrad", { S: 128, K: 128, N: 64 }, false, {});
    const [rounds, copies] = ["= uint4{rounded(x.x), rounded(x.y), rounded(x.z), rounded(x.w)};", "= x;"];
    expect(c.made.source).toContain(rounds);
    const made = { ...c.made, source: c.made.source.replace(rounds, copies) };
    await expect(hold(cudaEmulator([{ ...c, made }]), made, c)).rejects.toThrow(/truncated/);
  });
});

test("tilings of products in TF32 fit a multiprocessor; small products and rows of no multiple of 16 bytes have another kernel", () => {
  const made = (op: OpName, S: number, N: number, K: number) => {
    const small = specFor("tiling", op, { S: 8, K: 8, N: 8, tf32: 1 }, "f32");
    return productOf({ ...small, d: { ...small.d, S, N, K } });
  };
  expect(tf32Tiling(made("gemm", 4096, 4096, 4096))).toMatchObject({ tile: large, stages: 4, blocks: 132, parts: 1, prepared: true });
  // 44 of 704 tiles are left for a last round
  expect(tf32Tiling(made("gemm", 8192, 4096, 14336))).toMatchObject({ tile: large, divided: 44, prepared: true });
  // 256 tiles in two rounds
  expect(tf32Tiling(made("gemm", 16384, 768, 2048))).toMatchObject({ tile: large, divided: 0 });
  // 32 tiles
  expect(tf32Tiling(made("gemm_wgrad", 16384, 768, 2048))).toMatchObject({ tile: large, parts: 4, blocks: 128 });
  expect(fitsTf32(made("gemm", 4096, 4096, 4096))).toBe(true);
  expect(fitsTf32(made("gemm", 512, 512, 512))).toBe(false);
  expect(fitsTf32(made("gemm", 4096, 4096, 4098))).toBe(false);
  const next = random(3);
  const size = (most: number) => 4 * Math.ceil(((next() + 1) / 2) * (most / 4));
  for (let i = 0; i < 100; i++) {
    const { stages, blocks, parts, divided } = tf32Tiling(
      made((["gemm", "gemm_dgrad", "gemm_wgrad"] as const)[i % 3]!, size(20000), size(8192), size(16384)),
    );
    expect(stages).toBeGreaterThanOrEqual(4);
    expect(blocks).toBeLessThanOrEqual(132);
    expect(divided).toBeLessThan(blocks);
    expect(parts === 1 || divided === 0).toBe(true);
  }
});

const gpu = firstGpu();
const none = typeof gpu === "string" ? gpu : gpu.arch === "sm_90a" ? undefined : `${gpu.name} is no Hopper`;
describe.skipIf(none)(`on this machine's GPU${none ? ` (skipped: ${none})` : ""}`, () => {
  for (const { title, cases } of groups)
    test(title, full, async () => {
      if (typeof gpu === "string") return;
      const all = cases();
      const device = cudaDevice(gpu, all);
      for (const c of all) await hold(device, c.made, c);
    });
});
