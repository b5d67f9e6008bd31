/**
 * The contract of CUDA kernels: a generated kernel of any sizes and types of the contract equals its op's reference.
 * The different sources of all architectures run as C++ on the CPU; on a machine with a GPU also there.
 */
import { describe, expect, test } from "vitest";
import { type Arch, archs } from "../../schemas/devices.ts";
import { type OpName, opNames } from "../../schemas/opNames.ts";
import { cudaKernels } from "../../src/codegen/cuda/index.ts";
import type { CudaGenerator, GeneratedKernel } from "../../src/codegen/kernelSpec.ts";
import { mapFormulaOps, ops } from "../../src/ops/index.ts";
import { type ContractCase, casesInTier, type Executor, type Half } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { cudaDevice, firstGpu } from "../support/cudaDevice.ts";
import { cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { isFull, once } from "../support/tiers.ts";
import { messageDrafts } from "../support/transportCases.ts";

/** The cases of an op. In the fast tier its last one: in 16 bits if the op has them, with all that accumulates; other files have f32 and older architectures. */
const casesHere = (op: OpName, half: Half): ContractCase[] => casesInTier(ops[op], half, "last");

interface MadeCase extends ContractCase {
  readonly made: GeneratedKernel;
}
/** The cases with a kernel each, named apart; one for each architecture whose kernel is another. */
function makeAll(op: OpName, maker: CudaGenerator, on: readonly Arch[], cases = casesHere(op, "bf16")): MadeCase[] {
  return cases.flatMap((c, i) => {
    const known = new Set<string>();
    return on.flatMap((arch) => {
      const as = (name: string) => ({ ...c, title: `${c.title}, ${arch}`, use: { ...c.use, name } });
      const text = JSON.stringify(maker(as("same").use, arch));
      if (known.has(text)) return [];
      known.add(text);
      const own = as(`${op}_${i}_${arch}_${halfOf(c)}`);
      return [{ ...own, made: maker(own.use, arch) }];
    });
  });
}

const halfOf = ({ use }: ContractCase): string => Object.values(use.dtype).find((t) => t === "bf16" || t === "f16") ?? "f32";

async function holdAll(executor: Executor, cases: readonly MadeCase[]): Promise<void> {
  const failed: string[] = [];
  for (const c of cases) await hold(executor, c.made, c).catch((error) => failed.push(String(error.message)));
  expect(failed).toEqual([]);
}

/** In the other 16-bit type, which the same makers write: sizes that are multiples of nothing, and sizes that fill vectors and tiles. */
const inF16 = (op: OpName): ContractCase[] =>
  casesInTier(ops[op], "f16", "last").filter(
    (c) => Object.values(c.use.dtype).includes("f16") && (op in messageDrafts || /: (odd|aligned),/.test(c.title)),
  );

const missing = await emulatorMissing();
describe.skipIf(missing)(`emulated${missing ? ` (skipped: ${missing})` : ""}`, () => {
  // formulas are written by one generator: in the fast tier every fourth of them
  const formulas = Object.keys(mapFormulaOps(() => undefined));
  const all = isFull ? opNames : opNames.filter((op) => !formulas.includes(op) || formulas.indexOf(op) % 4 === 0);
  // the cases of the fast tier are few: several ops share a library, and g++ reads its headers once for them
  const together = isFull ? 1 : 32;
  const groups = Array.from({ length: Math.ceil(all.length / together) }, (_, n) => all.slice(n * together, (n + 1) * together));
  /** The cases of a group by op, and their library; compiled at the first call. */
  const prepared = groups.map((group) =>
    once(async () => {
      const cases = new Map(
        group.map((op) => [
          op,
          [
            ...makeAll(op, cudaKernels[op], isFull ? ["sm_90a", ...archs] : ["sm_90a"]),
            ...(isFull ? makeAll(op, cudaKernels[op], ["sm_90a"], inF16(op)) : []),
          ],
        ]),
      );
      const executor = cudaEmulator([...cases.values()].flat());
      await executor.prepare();
      return { cases, executor };
    }),
  );
  describe.each(groups.map((group, n) => ({ group, n })))("group $n", ({ group, n }) => {
    test.each(group)("%s equals its reference", async (op) => {
      const here = prepared[n]!();
      // g++ compiles the next group while this one runs; its own tests report its errors
      prepared[n + 1]?.().catch(() => undefined);
      const { cases, executor } = await here;
      await holdAll(executor, cases.get(op)!);
    });
  });
});

const gpu = firstGpu();
const none = typeof gpu === "string";
describe.skipIf(none)(`on a device${none ? ` (skipped: ${gpu})` : `: ${gpu.name}`}`, () => {
  for (const op of opNames)
    test(`${op} does what its reference does`, async () => {
      if (none) return;
      const cases = [...makeAll(op, cudaKernels[op], [gpu.arch]), ...makeAll(op, cudaKernels[op], [gpu.arch], inF16(op))];
      await holdAll(cudaDevice(gpu, cases), cases);
    });
});
