/** Attention in WGSL beyond the contract's small sizes: wide heads, blocks of 64 queries, and a piece of the sequence in its midst. */
import { afterAll, expect, test } from "vitest";
import { create } from "webgpu";
import type { Dtype } from "../schemas/plan.ts";
import type { Use } from "../src/kernels/kernel.ts";
import { attention } from "../src/kernels/wgsl/attention.ts";
import { ops } from "../src/ops/index.ts";
import { type ContractCase, hold } from "./contract.ts";
import { random } from "./opCases.ts";
import { adapterEnv, noAdapter } from "./softwareAdapter.ts";
import { wgslExecutor } from "./wgslExecutor.ts";

// the adapter is seen once its environment stands
const gpu = adapterEnv && !noAdapter ? create([]) : undefined;
const adapter = await gpu?.requestAdapter();
const device = await adapter?.requestDevice();
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

type Sizes = Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C", number>>;

function useOf(op: string, d: Sizes, half: Dtype = "f32"): Use {
  const query = d.B * d.S * d.G * d.M * d.C;
  const key = d.B * d.U * d.G * d.C;
  const forward = { q: query, k: key, v: key, o: query, lse: query / d.C };
  const size = op === "attention" ? forward : { ...forward, dy: query, dq: query, dk: key, dv: key };
  const dtype = Object.fromEntries(Object.keys(size).map((n) => [n, n === "lse" ? "f32" : half]));
  return { op, name: `${op}_0`, d, size, dtype, keeps: new Set(), bound: 0, makesRows: false, mayOverflow: false };
}

/** Both kernels on the same data: the gradient's own inputs are what the forward left. */
function casesOf(d: Sizes, start: number): ContractCase[] {
  const next = random(d.C);
  const data: Record<string, Float32Array> = {};
  return ["attention", "attention_grad"].map((op) => {
    const use = useOf(op, d);
    const outputs = ops[op]!.outputs.map((o) => o.name);
    for (const [name, size] of Object.entries(use.size))
      data[name] ??= outputs.includes(name) ? new Float32Array(size) : new Float32Array(size).map(() => 2 * next());
    ops[op]!.cpu(data, d, { start: () => start, rows: new Int32Array(1) });
    const pick = (names: readonly string[]) => Object.fromEntries(names.map((n) => [n, data[n]!.slice()]));
    return { title: `${op} ${JSON.stringify(d)}`, use, data: pick(Object.keys(use.size)), starts: { S: start }, want: pick(outputs) };
  });
}

test.skipIf(noAdapter).each([
  ["heads of 132, queries 4 to 22 of 30", { B: 1, S: 19, U: 30, G: 1, M: 2, C: 132 }, 4],
  ["blocks of 64 queries, the last with 2", { B: 16, S: 66, U: 66, G: 4, M: 1, C: 4 }, 0],
  ["one query, one key, one channel", { B: 1, S: 1, U: 1, G: 1, M: 1, C: 1 }, 0],
] as const)(
  `%s${noAdapter ? ` (skipped: ${noAdapter})` : ""}`,
  async (_, d, start) => {
    for (const c of casesOf(d, start)) await hold(executor!, attention[c.use.op]!(c.use), c);
  },
  LONG,
);

test.each(["f32", "f16"] as const)("kernels of real sizes compile within default limits: %s", async (half) => {
  for (const op of Object.keys(attention))
    for (const C of [64, 80, 128, 256]) {
      const made = attention[op]!(useOf(op, { B: 2, S: 2048, U: 4096, G: 4, M: 8, C }, half));
      checked.pushErrorScope("validation");
      const module = checked.createShaderModule({ code: made.source });
      for (const { entry } of made.launches) checked.createComputePipeline({ layout: "auto", compute: { module, entryPoint: entry } });
      expect((await checked.popErrorScope())?.message, `${op} ${C}`).toBeUndefined();
    }
});
