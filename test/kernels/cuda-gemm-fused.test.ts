/** Fused products on Hopper equal their references: sums of products, products with a formula behind them, and two products of one operand. */
import { describe, test } from "vitest";
import type { Float16 } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import type { HopperTiling } from "../../src/codegen/cuda/gemmHopper.ts";
import { emulatorMissing } from "../support/cudaEmulator.ts";
import { type Held, holdAll, inTier, rows, small, tiled, turns, wide } from "../support/heldProducts.ts";
import { fusedCaseOf, type Sizes, sumCaseOf } from "../support/productCases.ts";
import { full } from "../support/tiers.ts";

const missing = await emulatorMissing();
describe.skipIf(missing)(`Hopper's fused products${missing ? ` (skipped: ${missing})` : ""}`, () => {
  test(
    "sums of products of one input: depths that end within a step, experts without rows, clusters and warpgroups that alternate",
    full,
    () => {
      const summed = (name: string, op: OpName, sizes: Parameters<typeof sumCaseOf>[2], change: Partial<HopperTiling>): Held => {
        const c = sumCaseOf(name, op, sizes, "bf16");
        return { ...c, made: tiled(c.use, change) };
      };
      return holdAll(
        inTier(
          [
            summed("s0", "gemm_dgrad_pair", { S: 300, K: 200, depths: [136, 72] }, { tile: small, stages: 2 }),
            summed("s1", "gemm_dgrad_pair", { S: 140, K: 136, depths: [64, 8] }, { tile: wide, stages: 3, cluster: 2 }),
            summed("s2", "gemm_dgrad_triple", { S: 150, K: 72, depths: [8, 136, 64] }, { tile: turns, stages: 3 }),
            summed("s3", "grouped_dgrad_pair", { K: 136, rows, depths: [72, 72] }, { tile: small, stages: 2, raster: 4 }),
            summed("s4", "grouped_dgrad_pair", { K: 72, rows, depths: [40, 104] }, { tile: turns, stages: 2 }),
          ],
          "s3",
        ),
      );
    },
  );
  test("epilogues: sets of buffers that are used again in a tile and in the next, rows of two experts in a box, columns that end within one", () => {
    const finished = (name: string, op: OpName, sizes: Sizes, change: Partial<HopperTiling>, half: Float16 = "bf16"): Held => {
      const c = fusedCaseOf(name, op, sizes, half);
      return { ...c, made: tiled(c.use, change) };
    };
    const square = { rows: 128, columns: 128, alternates: true } as const;
    const long = { rows: 128, columns: 192, alternates: true } as const;
    return holdAll(
      inTier(
        [
          finished("e0", "gemm_swiglu", { S: 300, K: 136, N: 200 }, { tile: turns, stages: 2, sets: 1, buffers: 2 }),
          finished("e1", "gemm_dgrad_swiglu", { S: 300, K: 200, N: 72 }, { tile: turns, stages: 2, sets: 2, buffers: 6 }),
          finished("e2", "grouped_gemm_swiglu", { K: 72, N: 136, rows }, { tile: square, stages: 2, sets: 2, buffers: 4 }),
          finished("e3", "grouped_dgrad_swiglu", { K: 264, N: 72, rows }, { tile: turns, stages: 3, sets: 1, buffers: 3 }),
          finished("e4", "grouped_dgrad_swiglu", { K: 136, N: 136, rows }, { tile: square, stages: 2, sets: 2, buffers: 6 }),
          // a tile of up to 64 rows has three parts of six, so that its two sets differ in phase; the last tile of a row has 128 columns of 192
          finished(
            "e6",
            "grouped_gemm_swiglu",
            { K: 72, N: 264, rows: [64, 65, 1, 0, 193, 50] },
            { tile: long, stages: 2, sets: 2, buffers: 4 },
          ),
          finished(
            "e7",
            "grouped_dgrad_swiglu",
            { K: 264, N: 72, rows: [64, 65, 1, 0, 193] },
            { tile: long, stages: 2, sets: 1, buffers: 3 },
          ),
          finished(
            "e5",
            "grouped_dgrad_swiglu",
            { K: 64, N: 64, rows: [0, 150, 0] },
            { tile: turns, stages: 2, sets: 2, buffers: 6 },
            "f16",
          ),
        ],
        "e3",
        "e6",
      ),
    );
  });
  test("two products of one operand: clusters that share b, warpgroups that alternate, parts of the depth of both", () => {
    const twins = (name: string, op: "gemm_pair" | "gemm_wgrad_pair", sizes: Sizes, change: Partial<HopperTiling>, adds = false): Held => {
      const c = fusedCaseOf(name, op, sizes, "bf16", adds);
      return { ...c, made: tiled(c.use, change) };
    };
    return holdAll(
      inTier(
        [
          twins("p0", "gemm_pair", { S: 400, K: 136, N: 200 }, { tile: wide, stages: 2, cluster: 2, blocks: 4, raster: 4 }),
          twins("p1", "gemm_pair", { S: 190, K: 72, N: 72 }, { tile: turns, stages: 3 }),
          twins("p2", "gemm_wgrad_pair", { S: 200, K: 264, N: 136 }, { tile: wide, stages: 2, cluster: 2 }, true),
          twins("p3", "gemm_wgrad_pair", { S: 300, K: 136, N: 72 }, { tile: turns, stages: 2, parts: 3 }, true),
          twins("p4", "gemm_wgrad_pair", { S: 300, K: 40, N: 200 }, { tile: wide, stages: 2, parts: 2 }),
        ],
        "p0",
        "p3",
      ),
    );
  });
  test("weight gradients of two products of one operand: from both ends of the list, in f32 and in bf16, added and written", () => {
    const pair = (name: string, change: Partial<HopperTiling>, adds: boolean, sums: "f32" | "bf16" = "f32"): Held => {
      const c = fusedCaseOf(name, "grouped_wgrad_pair", { K: 136, N: 72, rows }, "bf16", adds, sums);
      return { ...c, made: tiled(c.use, change) };
    };
    return holdAll(
      inTier(
        [
          pair("x0", { tile: turns, stages: 2, blocks: 5 }, false),
          pair("x1", { tile: turns, stages: 3, blocks: 4 }, true),
          pair("x2", { tile: small, stages: 2 }, true, "bf16"),
        ],
        "x1",
      ),
    );
  });
});
