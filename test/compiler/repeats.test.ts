/** Equal layers share work: a pass computes once per form, so its work does not grow with the layers, and the plan is that of separate work. */
import { readdirSync } from "node:fs";
import { describe, expect, test } from "vitest";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { buildMesh } from "../../src/passes/mesh.ts";
import { shardJob } from "../../src/passes/shardJob.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan, sealPlan } from "../../src/plan/seal.ts";
import { root } from "../support/checkout.ts";
import { jobAt } from "../support/scale.ts";
import { byTier } from "../support/tiers.ts";

const shardedOf = (job: Job) => shardJob(job, buildMesh(job)).sharded;

test("sharding decides once per form of a node: twice the layers have twice the steps and the same forms", () => {
  const [few, many] = [4, 8].map((layers) => shardedOf(jobAt("mixtral-8x7b-16gpu", { "model.layers": layers })));
  expect(many?.steps.length).toBeGreaterThan(1.8 * (few?.steps.length ?? 0));
  expect(many?.forms).toBe(few?.forms);
});

test("DeepSeek-V3 has fewer than 400 forms of nodes", () => {
  const { steps, updates, forms } = shardedOf(jobAt("deepseek-v3-1024gpu", {}));
  expect(steps.length + updates.length).toBeGreaterThan(10_000);
  expect(forms).toBeLessThan(400);
});

test("sizes are checked once per form, and a fault of one layer among equal ones is found", () => {
  const { plan } = compile(jobAt("tiny-interleaved", {}));
  const text = printPlan(plan);
  expect(parsePlan(text, "plan.json").digests).toEqual(plan.digests);
  for (const layer of [0, 1, 2, 3]) {
    const draft: typeof plan = structuredClone(plan);
    const all = draft.programs.flatMap(({ chunks }) => chunks.flatMap(({ forward }) => forward));
    const product = all.find((i) => i.kind === "compute" && i.op === "gemm" && i.id.startsWith(`layers.${layer}.`));
    if (product?.kind !== "compute" || !product.dims.N) throw new Error(`layer ${layer} has no product`);
    product.dims.N[0] *= 2;
    expect(() => parsePlan(printPlan(sealPlan(draft)), "plan.json")).toThrow(`${product.id}: `);
  }
});

const examples = readdirSync(`${root}plans`);
for (const { options, rows } of byTier(examples, (name) => name.startsWith("tiny-m") || name === "tiny-interleaved"))
  describe("shared decisions", options, () => {
    test.each(rows)("%s: the plan is that of a decision for each node", (name) => {
      const job = jobAt(name, {});
      // a choice of one's own switches sharing off; this one leaves every choice to the rules
      const separate = compile(job, { pick: () => undefined });
      expect(compile(job).plan.digests).toEqual(separate.plan.digests);
    });
  });
