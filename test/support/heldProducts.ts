/** Products on Hopper with a given tiling, run by the emulator and compared with their reference. */
import { expect } from "vitest";
import type { Float16 } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import { type HopperTiling, hopper, hopperTiling } from "../../src/codegen/cuda/gemmHopper.ts";
import { halfOf } from "../../src/codegen/cuda/matmul.ts";
import type { GeneratedKernel, KernelSpec } from "../../src/codegen/kernelSpec.ts";
import { productOf } from "../../src/codegen/matmul.ts";
import type { ContractCase } from "./contract.ts";
import { hold } from "./contractCheck.ts";
import { cudaEmulator } from "./cudaEmulator.ts";
import { caseOf, type Sizes } from "./productCases.ts";
import { isFull } from "./tiers.ts";

/** A case and the kernel that runs it. */
export interface Held extends ContractCase {
  readonly made: GeneratedKernel;
}

/** Returns the cases; in the fast tier those of these names. */
export const inTier = (cases: readonly Held[], ...fast: readonly string[]): readonly Held[] =>
  isFull ? cases : cases.filter((c) => fast.includes(c.use.name));

/** Fails if a case differs from its reference, in one of the orders of threads. */
export async function holdAll(cases: readonly Held[], orders?: readonly number[]): Promise<void> {
  const executor = await cudaEmulator(cases, orders);
  const failed: string[] = [];
  for (const c of cases) await hold(executor, c.made, c).catch((error) => failed.push(String(error.message)));
  expect(failed).toEqual([]);
}

/** Returns the kernel of a product with two blocks for all tiles, so that each walks over several. */
export const tiled = (use: KernelSpec, change: Partial<HopperTiling>): GeneratedKernel => {
  const p = productOf(use);
  return hopper(use, p, halfOf(p)!, { ...hopperTiling(p), cluster: 1, blocks: 2, ...change });
};

/** Returns a product whose kernel has a tiling. */
export const held = (
  name: string,
  op: OpName,
  sizes: Sizes,
  adds: boolean,
  change: Partial<HopperTiling>,
  half: Float16 = "bf16",
): Held => {
  const c = caseOf(name, op, sizes, half, adds);
  return { ...c, made: tiled(c.use, change) };
};

/** Tiles of tests: small ones, so that few rows and columns make several. */
export const small = { rows: 128, columns: 64 } as const;
export const wide = { rows: 128, columns: 128 } as const;
export const low = { rows: 64, columns: 128 } as const;
export const turns = { rows: 128, columns: 64, alternates: true } as const;
/** Rows of experts: none, one, a whole tile, and others. */
export const rows = [130, 0, 17, 128, 1, 200];
