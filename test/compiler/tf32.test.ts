/** TF32: which instructions round their operands, to what, and that training goes on within the rounding. */
import { expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { fusions } from "../../src/codegen/targetNames.ts";
import { cpu, loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { ops } from "../../src/ops/index.ts";
import { fixture, jobOf } from "../support/job.ts";

const jobWith = (train: object = {}) =>
  jobOf({
    name: "rounded",
    model: { layers: 2, hidden: 32, ffn: 48, heads: 4, vocab: 256, seq: 16, moe: { experts: 4, top_k: 2, ffn: 16, layers: { every: 2 } } },
    train: { global_batch: 4, steps: 2, precision: "fp32", init: { std: 0.2 }, optimizer: { lr: 1e-2 }, ...train },
    data: { path: "corpus.txt" },
  });
const computes = (plan: Plan) => plan.programs.flatMap(instructionsOf).flatMap((i) => (i.kind === "compute" ? [i] : []));
const roundedOps = (plan: Plan): string[] => [...new Set(computes(plan).flatMap((i) => (i.attrs.tf32 ? [i.op] : [])))].sort();

async function losses(plan: Plan): Promise<number[]> {
  const run = await openRun(plan, { baseDir: fixture("") });
  const steps = [await run.step(), await run.step()];
  await run.close();
  return steps.map(({ loss }) => loss);
}

test("products of a job in TF32 have the attribute, fused ones too, and no other instruction and no other job", () => {
  const { plan } = compile(jobWith({ matmul: "tf32" }));
  expect(roundedOps(plan)).toEqual(["gemm", "gemm_dgrad", "gemm_wgrad", "grouped_dgrad", "grouped_gemm", "grouped_wgrad"]);
  expect(computes(plan).filter((i) => /gemm|grouped/.test(i.op) && !i.attrs.tf32)).toEqual([]);
  const fused = compile(jobWith({ matmul: "tf32" }), { target: { ...cpu, fuses: fusions } }).plan;
  expect(roundedOps(fused)).toEqual(
    expect.arrayContaining(["gemm_dgrad_triple", "gemm_swiglu", "gemm_dgrad_swiglu", "grouped_wgrad_pair", "gemm_pair", "gemm_wgrad_pair"]),
  );
  expect(roundedOps(compile(jobWith({ matmul: "f32" })).plan)).toEqual([]);
  expect(roundedOps(compile(jobWith()).plan)).toEqual([]);
});

test("losses differ from those of f32 by the rounding, 11 bits of each operand", async () => {
  const [exact = [], rounded = []] = await Promise.all([
    losses(compile(jobWith()).plan),
    losses(compile(jobWith({ matmul: "tf32" })).plan),
  ]);
  for (const [i, loss] of rounded.entries()) {
    const difference = Math.abs(loss - (exact[i] ?? 0));
    expect(difference).toBeGreaterThan(1e-7);
    expect(difference).toBeLessThan(2 ** -10 * loss);
  }
});

test("operands are rounded to 10 bits of mantissa, to the nearest, of two equally near the larger; infinity stays", () => {
  const round = (x: number): number => {
    const t = { x: Float32Array.of(x), w: Float32Array.of(1), y: Float32Array.of(0) };
    ops.gemm.cpu(t, { B: 1, S: 1, K: 1, N: 1, tf32: 1 }, { start: () => 0, rows: new Int32Array(1) });
    return t.y[0] ?? Number.NaN;
  };
  const [low, high] = [1, 1 + 2 ** -10];
  expect([1 + 2 ** -12, 1 + 2 ** -11 - 2 ** -20, 1 + 2 ** -11, -1 - 2 ** -11, 1 + 2 ** -10].map(round)).toEqual([
    low,
    low,
    high,
    -high,
    high,
  ]);
  expect(round(Number.POSITIVE_INFINITY)).toBe(Number.POSITIVE_INFINITY);
  expect(round(Number.NaN)).toBeNaN();
});

test("WebGPU has no products in TF32, and says so", async () => {
  const target = await loadTarget("webgpu");
  expect(() => compile(jobWith({ matmul: "tf32" }), { target })).toThrow(/TF32, and WebGPU has no such products/);
});
