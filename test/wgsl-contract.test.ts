/** The contract of kernels on WebGPU: every WGSL kernel is its op's reference, within default limits. */
import { afterAll, describe, expect, test } from "vitest";
import { create } from "webgpu";
import { wgslKernels } from "../src/kernels/wgsl/index.ts";
import { ops } from "../src/ops/index.ts";
import { casesOf, hold } from "./contract.ts";
import { adapterEnv, noAdapter } from "./softwareAdapter.ts";
import { wgslExecutor } from "./wgslExecutor.ts";

// the adapter is seen once its environment stands
const gpu = adapterEnv && !noAdapter ? create([]) : undefined;
const adapter = await gpu?.requestAdapter();
const device = await adapter?.requestDevice({ requiredFeatures: [...adapter.features].filter((f) => f === "shader-f16") });
const executor = device && wgslExecutor(device, adapter!.info.architecture);
/** Dawn without a device: it knows f16, and has WebGPU's default limits. */
const checker = create(["backend=null"]);
const checked = await (await checker.requestAdapter())!.requestDevice({ requiredFeatures: ["shader-f16"] });
const kept: unknown[] = [gpu, adapter, checker];
const LONG = 120_000; // a software adapter beside other tests
afterAll(() => {
  device?.destroy();
  checked.destroy();
  // Dawn's objects do not keep what they came from
  kept.length = 0;
});

test("every op of the table has a WGSL kernel", () => {
  expect(Object.keys(ops).filter((name) => !wgslKernels[name])).toEqual([]);
});

const table = Object.values(ops).filter((o) => wgslKernels[o.name]);
describe.each(table.map((o) => [o.name, o] as const))("%s", (name, op) => {
  const cases = casesOf(op, "f16").map((c) => ({ ...c, made: wgslKernels[name]!(c.use, "f16") }));

  test.skipIf(noAdapter)(
    `equals the reference${noAdapter ? ` (skipped: ${noAdapter})` : ""}`,
    async () => {
      for (const c of cases) await hold(executor!, c.made, c).catch(failure(c.title));
    },
    LONG,
  );

  test(
    "compiles within WebGPU's default limits",
    async () => {
      for (const { title, made } of cases) {
        checked.pushErrorScope("validation");
        const module = checked.createShaderModule({ code: made.source });
        const { messages } = await module.getCompilationInfo();
        for (const { entry } of made.launches) checked.createComputePipeline({ layout: "auto", compute: { module, entryPoint: entry } });
        const wrong = await checked.popErrorScope();
        expect(
          messages.map((m) => `${m.lineNum}:${m.linePos} ${m.message}`),
          `${title}\n${made.source}`,
        ).toEqual([]);
        expect(wrong?.message, `${title}\n${made.source}`).toBeUndefined();
      }
    },
    LONG,
  );

  test("the same use makes the same kernel, with all its names its own", () => {
    for (const { use, made } of cases) {
      expect(wgslKernels[name]!(use, "f16")).toEqual(made);
      for (const l of made.launches) expect(l.entry === use.name || l.entry.startsWith(`${use.name}_`), l.entry).toBe(true);
    }
  });
});

const failure = (title: string) => (error: unknown) => {
  throw error instanceof Error && !error.message.includes(title) ? new Error(`${title}: ${error.message}`, { cause: error }) : error;
};
