/**
 * The contract of CUDA kernels: what a maker makes for any sizes and types of the contract does what the op's reference does.
 * Their sources run as C++ on the CPU, those of every architecture that differ; and on a real device where there is one.
 */
import { describe, expect, test } from "vitest";
import { cudaKernels } from "../src/kernels/cuda/index.ts";
import type { CudaMaker, Made } from "../src/kernels/kernel.ts";
import { ops } from "../src/ops/index.ts";
import { type Arch, archs } from "../src/target.ts";
import { type ContractCase, casesOf, type Executor, hold } from "./contract.ts";
import { cudaDevice, firstGpu } from "./cudaDevice.ts";
import { cudaEmulator, emulatorMissing } from "./cudaEmulator.ts";
import { messageDrafts } from "./messageDrafts.ts";

interface MadeCase extends ContractCase {
  readonly made: Made;
}
/** The cases with a kernel each, named apart; one for each architecture whose kernel is another. */
function makeAll(op: string, maker: CudaMaker, on: readonly Arch[], cases = casesOf(ops[op]!, "bf16")): MadeCase[] {
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
const inF16 = (op: string): ContractCase[] =>
  casesOf(ops[op]!, "f16").filter(
    (c) => Object.values(c.use.dtype).includes("f16") && (op in messageDrafts || /: (odd|aligned),/.test(c.title)),
  );

const missing = await emulatorMissing();
describe.skipIf(missing)(`emulated${missing ? ` (skipped: ${missing})` : ""}`, () => {
  // made when their turn comes, or while the one before runs: compilers work beside
  const prepared = new Map<string, { cases: MadeCase[]; executor: ReturnType<typeof cudaEmulator> }>();
  const prepare = (op: string) => {
    const cases = [...makeAll(op, cudaKernels[op]!, ["sm_90a", ...archs]), ...makeAll(op, cudaKernels[op]!, ["sm_90a"], inF16(op))];
    const executor = cudaEmulator(cases);
    prepared.set(op, { cases, executor });
    return executor.prepare();
  };
  for (const [i, op] of Object.keys(cudaKernels).entries())
    test(`${op} does what its reference does`, { timeout: 240_000 }, async () => {
      const first = prepared.has(op) ? prepared.get(op)!.executor.prepare() : prepare(op);
      const next = Object.keys(cudaKernels)[i + 1];
      // what goes wrong with the next one, its own test says
      if (next)
        Promise.resolve(next)
          .then(prepare)
          .catch(() => undefined);
      await first;
      const { cases, executor } = prepared.get(op)!;
      await holdAll(executor, cases);
    });
});

const gpu = firstGpu();
const none = typeof gpu === "string";
describe.skipIf(none)(`on a device${none ? ` (skipped: ${gpu})` : `: ${gpu.name}`}`, () => {
  for (const [op, maker] of Object.entries(cudaKernels))
    test(`${op} does what its reference does`, { timeout: 240_000 }, async () => {
      if (none) return;
      const cases = [...makeAll(op, maker, [gpu.arch]), ...makeAll(op, maker, [gpu.arch], inF16(op))];
      await holdAll(cudaDevice(gpu, cases), cases);
    });
});
