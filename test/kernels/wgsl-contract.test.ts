/** The contract of kernels on WebGPU: every WGSL kernel is its op's reference, within default limits. */
import { createHash } from "node:crypto";
import { describe, expect, test } from "vitest";
import type { OpName } from "../../schemas/opNames.ts";
import { wgslGenerator, wgslKernels } from "../../src/codegen/wgsl/index.ts";
import { foldGrid } from "../../src/codegen/wgsl/text.ts";
import { ops } from "../../src/ops/index.ts";
import type { AnyOp } from "../../src/ops/op.ts";
import { type ContractCase, casesInTier, casesOf } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { noAdapter } from "../support/softwareAdapter.ts";
import { full, isFull, once } from "../support/tiers.ts";
import { openWgslDevices } from "../support/wgslDevices.ts";

const { executor, checked } = await openWgslDevices({ features: ["shader-f16"], checked: { features: ["shader-f16"] } });

// a software adapter takes most of its time to compile: in the fast tier one case of each op compiles, and those of some ops run, of each generator one
const inTier = (op: AnyOp): ContractCase[] => casesInTier(op, "f16", "first");
const representatives: readonly OpName[] = [
  ...(["attention_merge", "bias_update", "dropout", "grouped_gemm", "latent_kv_grad", "unpermute", "rmsnorm_grad", "rope"] as const),
  ...(["top_k_mask", "arrange", "softmax_terms", "swiglu_grad", "sum_squares", "adamw_cast"] as const),
];
const isRun = (name: OpName): boolean => isFull || representatives.includes(name);
const runs = (name: OpName) => (isRun(name) ? {} : full);

const table = Object.values(ops).filter((o) => o.name in wgslKernels);
describe.each(table.map((o) => [o.name, o] as const))("%s", (name, op) => {
  // the cases of all ops together take seconds to make
  const cases = once(() => inTier(op).map((c) => ({ ...c, made: wgslGenerator(name)(c.use, "f16") })));

  test.skipIf(noAdapter)(`equals the reference${noAdapter ? ` (skipped: ${noAdapter})` : ""}`, runs(name), async () => {
    for (const c of cases()) await hold(executor!, c.made, c).catch(failure(c.title));
  });

  test.skipIf(noAdapter)("gives the same bits again", runs(name), async () => {
    const { made, use, data, starts } = cases().find((c) => c.title.includes(": long,")) ?? cases().at(-1)!;
    const bits = async () => {
      const have = await executor!.run(made, use, data, starts);
      return Object.entries(have).map(([n, x]) => `${n} ${createHash("sha256").update(x).digest("hex")}`);
    };
    expect(await bits()).toEqual(await bits());
  });

  test(`compiles${isRun(name) ? " within WebGPU's default limits" : ""}`, async () => {
    for (const { title, made } of cases()) {
      checked.pushErrorScope("validation");
      const module = checked.createShaderModule({ code: made.source });
      const { messages } = await module.getCompilationInfo();
      // a pipeline shows the limits, and takes as long as the module
      for (const { entry } of isRun(name) ? made.launches : [])
        checked.createComputePipeline({ layout: "auto", compute: { module, entryPoint: entry } });
      const wrong = await checked.popErrorScope();
      expect(
        messages.map((m) => `${m.lineNum}:${m.linePos} ${m.message}`),
        `${title}\n${made.source}`,
      ).toEqual([]);
      expect(wrong?.message, `${title}\n${made.source}`).toBeUndefined();
    }
  });

  test("equal specs give equal kernels, whose names are unique", () => {
    for (const { use, made } of cases()) {
      expect(wgslGenerator(name)(use, "f16")).toEqual(made);
      for (const l of made.launches) expect(l.entry === use.name || l.entry.startsWith(`${use.name}_`), l.entry).toBe(true);
    }
  });
});

describe.skipIf(noAdapter)("numbers that f32 would lose", () => {
  /** A case of an op with other data; the largest difference from the reference, relative to the largest number. */
  async function error(
    name: OpName,
    starts: Record<string, number>,
    change: (data: Record<string, Float32Array>) => void,
  ): Promise<number> {
    const c = casesOf(ops[name], "f16")[0]!;
    const data = Object.fromEntries(Object.entries(c.data).map(([n, x]) => [n, Float32Array.from(x)]));
    change(data);
    const want = Object.fromEntries(Object.entries(data).map(([n, x]) => [n, x.slice()]));
    ops[name].cpu(want, c.use.d, { start: (dim) => starts[dim] ?? 0, rows: new Int32Array(1) });
    const have = await executor!.run(wgslGenerator(name)(c.use, "baseline"), c.use, data, { ...c.starts, ...starts });
    const out = ops[name].outputs[0]!.name;
    const largest = Math.max(...want[out]!.map(Math.abs));
    return Math.max(...want[out]!.map((x, i) => Math.abs(x - have[out]![i]!))) / largest;
  }

  test.each([1, 2, 10, 100, 500, 1000, 10_000, 100_000])("adamw's step %d: the bias correction of the moments", async (step) => {
    const off = error("adamw", {}, (data) => {
      for (const name of ["w", "m", "v"]) data[name]!.fill(0);
      data.step!.fill(step);
    });
    expect(await off).toBeLessThan(1e-6);
  });

  test.each([0, 4095, 131_067, 1_000_003])("rope from position %d on", async (S) => {
    expect(await error("rope", { S }, () => {})).toBeLessThan(3e-7);
  });
});

test("a folded grid has every index once, within the limit of each dimension", () => {
  for (const groups of [1, 2, 65535, 65536, 131071, 1_000_003, 65535 * 7 + 1]) {
    const { grid, index } = foldGrid(groups);
    expect(Math.max(...grid)).toBeLessThanOrEqual(65535);
    const [, wide] = /group\.y \* (\d+)u \+ group\.x/.exec(index) ?? [];
    expect(Number(wide ?? grid[0])).toBe(grid[0]);
    expect(grid[0] * grid[1]).toBeGreaterThanOrEqual(groups);
    expect(grid[0] * (grid[1] - 1)).toBeLessThan(groups);
  }
});

const failure = (title: string) => (error: unknown) => {
  throw error instanceof Error && !error.message.includes(title) ? new Error(`${title}: ${error.message}`, { cause: error }) : error;
};
