/**
 * The contract of CUDA kernels: what a maker makes for any sizes and types of the contract does what the op's reference does.
 * Their sources run as C++ on the CPU; and on a real device where there is one.
 */
import { describe, expect, test } from "vitest";
import { cudaKernels } from "../src/kernels/cuda/index.ts";
import { ops } from "../src/ops/index.ts";
import type { Arch } from "../src/target.ts";
import { casesOf, hold } from "./contract.ts";
import { cudaEmulator, emulatorMissing } from "./cudaEmulator.ts";

const kernelsFor = (arch: Arch) =>
  Object.entries(cudaKernels).map(([name, maker]) => ({
    name,
    cases: casesOf(ops[name]!, "bf16").map((c, i) => {
      const use = { ...c.use, name: `${name}_${i}` };
      return { ...c, use, made: maker(use, arch) };
    }),
  }));

const missing = await emulatorMissing();
describe.skipIf(missing)(`emulated${missing ? ` (skipped: ${missing})` : ""}`, () => {
  const kernels = kernelsFor("sm_90a").map((k) => ({ ...k, executor: cudaEmulator(k.cases) }));
  for (const [i, { name, cases, executor }] of kernels.entries())
    test(`${name} does what its reference does, in ${cases.length} cases`, { timeout: 240_000 }, async () => {
      // the next one's compiler works while this one's cases run; what it says, its own test says
      const first = executor.prepare();
      kernels[i + 1]?.executor.prepare().catch(() => undefined);
      await first;
      const failed: string[] = [];
      for (const c of cases) await hold(executor, c.made, c).catch((error) => failed.push(String(error.message)));
      expect(failed).toEqual([]);
    });
});
