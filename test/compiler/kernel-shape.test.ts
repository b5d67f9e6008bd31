/** The estimate knows the form of every op that multiplies: none is timed as one that streams. */
import { expect, test } from "vitest";
import type { Compute } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { buffersOf } from "../../src/analysis/bufferTable.ts";
import { kernelShape } from "../../src/analysis/estimate/kernelShape.ts";
import { fusions } from "../../src/codegen/targetNames.ts";
import { cpu } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { attentionVariant } from "../../src/ops/attentionVariants.ts";
import { ops } from "../../src/ops/index.ts";
import { jobOf } from "../support/job.ts";

const plansWithAllFusions = [{}, { moe: { experts: 4, top_k: 2, ffn: 16 } }].map(
  (more) =>
    compile(
      jobOf({
        name: "shapes",
        model: { layers: 1, hidden: 16, ffn: 24, heads: 2, kv_heads: 2, head_dim: 8, vocab: 256, seq: 8, ...more },
        parallel: { world: 1 },
        train: { micro_batch: 1, global_batch: 1, steps: 1, precision: "bf16", optimizer: { type: "muon", lr: 1e-3 } },
        data: { path: "corpus.txt" },
      }),
      { target: { ...cpu, fuses: fusions } },
    ).plan,
);

test("an op with products, alone or with what is fused to it, has the family and the type of its operands", () => {
  const seen = new Set<string>();
  for (const { programs, mesh } of plansWithAllFusions)
    for (const program of programs)
      for (const i of instructionsOf(program)) {
        if (i.kind !== "compute" || ops[i.op].flops === undefined) continue;
        const { family, dtype } = kernelShape(i, mesh, buffersOf(program));
        seen.add(i.op);
        expect(["streaming", "rows"], i.op).not.toContain(family);
        if (family !== "optimizer" && !family.startsWith("attention")) expect(family === "product_f32", i.op).toBe(dtype === "f32");
        if (i.op.includes("swiglu")) expect(dtype, i.op).toBe("bf16");
      }
  expect([...seen]).toEqual(
    expect.arrayContaining([
      "gemm_swiglu",
      "gemm_dgrad_swiglu",
      "grouped_gemm_swiglu",
      "grouped_dgrad_swiglu",
      "grouped_wgrad",
      "orthogonalize",
    ]),
  );
});

test("the sizes of a product multiply to its operations, and experts have the rows that tokens choose", () => {
  const seen = new Set<string>();
  for (const { programs, mesh, job } of plansWithAllFusions)
    for (const program of programs)
      for (const i of instructionsOf(program)) {
        if (i.kind !== "compute") continue;
        const { op, flops, sizes } = kernelShape(i, mesh, buffersOf(program));
        const { m, n, k, experts } = sizes;
        if (m === undefined || n === undefined || k === undefined || experts === undefined) continue;
        seen.add(i.op);
        expect(2 * m * n * k * experts, op).toBe(flops);
        if (i.op.startsWith("grouped")) expect((i.op.includes("wgrad") ? k : m) * experts, op).toBe(8 * (job.model.moe?.top_k ?? 0));
      }
  expect([...seen]).toEqual(
    expect.arrayContaining([
      "gemm_dgrad_pair",
      "gemm_dgrad_triple",
      "grouped_dgrad_pair",
      "grouped_wgrad_pair",
      "gemm_pair",
      "gemm_wgrad_pair",
    ]),
  );
});

test("the table of attention has what the signatures say: gradients take dy, dropout a sample, parts a shard of the keys", () => {
  for (const own of Object.values(ops)) {
    const variant = attentionVariant(own.name as Compute["op"]);
    if (!variant) {
      expect(own.name.startsWith("attention") && own.flops !== undefined, own.name).toBe(false);
      continue;
    }
    const inputs = own.inputs.map(({ name }) => name);
    expect(inputs.includes("dy"), own.name).toBe(variant.grad);
    expect(inputs.includes("sample"), own.name).toBe(variant.drops);
    expect(own.reduction === "merge", own.name).toBe(variant.part && !variant.grad);
    // all keys are on each rank, or a shard of them
    const keys = own.inputs.find(({ name }) => name === "k")!.dimSpecs.find(({ dim }) => dim === "U")!;
    expect(!keys.replicated, own.name).toBe(variant.part);
  }
});
