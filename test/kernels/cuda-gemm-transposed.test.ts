/** Products of f32 operands that are transposed in scratch before them equal their reference. */
import { describe, expect, test } from "vitest";
import type { OpName } from "../../schemas/opNames.ts";
import { transposedFirst } from "../../src/codegen/cuda/gemmTransposed.ts";
import { productOf } from "../../src/codegen/matmul.ts";
import type { ContractCase } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { caseOf, specFor, sumCaseOf } from "../support/productCases.ts";
import { isFull } from "../support/tiers.ts";

const missing = await emulatorMissing();
const both = ["a", "b"] as const;
const rows = [70, 0, 17, 64, 1, 40];

describe.skipIf(missing)(`products of transposed operands${missing ? ` (skipped: ${missing})` : ""}`, () => {
  const transposed = (c: ContractCase, operands: readonly ("a" | "b")[]) => ({
    ...c,
    made: transposedFirst(c.use, productOf(c.use), "sm_90a", operands),
  });
  test("of either operand and of both, per expert, and of sums of products: they equal their reference", async () => {
    const cases = [
      transposed(caseOf("grouped_dgrad_b", "grouped_dgrad", { K: 72, N: 136, rows }, "f32"), ["b"]),
      transposed(caseOf("gemm_a", "gemm", { S: 200, K: 72, N: 35 }, "f32"), ["a"]),
      transposed(caseOf("dgrad_both", "gemm_dgrad", { S: 200, K: 132, N: 68 }, "f32"), both),
      transposed(sumCaseOf("pair", "gemm_dgrad_pair", { S: 140, K: 136, depths: [36, 68] }, "f32"), both),
      transposed(sumCaseOf("grouped_pair", "grouped_dgrad_pair", { K: 72, depths: [36, 68], rows }, "f32"), ["b"]),
    ].slice(0, isFull ? 5 : 1);
    const emulator = cudaEmulator(cases);
    for (const c of cases) await hold(emulator, c.made, c);
  });
});

test("operands with contiguous depth are transposed where the product is long enough for it", () => {
  const launchesOf = (op: OpName, S: number, N: number, K: number) => {
    const small = specFor("k", op, { S: 8, K: 8, N: 8 }, "f32");
    const use = { ...small, d: { ...small.d, S, N, K } };
    return transposedFirst(use, productOf(use), "sm_90a").launches.map(({ entry }) => entry);
  };
  expect(launchesOf("gemm", 4096, 4096, 4096)).toEqual(["k_turn_x", "k"]);
  expect(launchesOf("gemm_dgrad", 4096, 4096, 4096)).toEqual(["k_turn_dy", "k_turn_w", "k"]);
  expect(launchesOf("gemm_wgrad", 4096, 4096, 4096)).toEqual(["k"]);
  // dy would take longer than it saves
  expect(launchesOf("gemm_dgrad", 16384, 2048, 768)).toEqual(["k_turn_w", "k"]);
  expect(launchesOf("gemm", 16384, 2048, 768)).toEqual(["k_turn_x", "k"]);
  expect(launchesOf("gemm_dgrad", 512, 512, 512)).toEqual(["k"]);
});
