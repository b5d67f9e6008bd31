/** The validator that a build writes accepts what the published schema accepts, and nothing else. */
import fc from "fast-check";
import { expect, test } from "vitest";
import type { Plan } from "../../schemas/plan.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { fastPlanSchema, fitsSchema, openFastAjv } from "../../src/plan/validator.ts";
import { jobOf } from "../support/job.ts";
import { draws } from "../support/tiers.ts";

const plan: Plan = compile(
  jobOf({
    name: "small",
    model: { layers: 2, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8, moe: { experts: 4, top_k: 2, ffn: 8 } },
    parallel: { world: 4, pipeline: 2, expert: 2 },
    train: { global_batch: 4, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  }),
  { target: await loadTarget("cuda:sm_90a") },
).plan;
const fast = openFastAjv().compile(fastPlanSchema());

type Tree = { [key: string]: Tree | unknown };
const isTree = (value: unknown): value is Tree => typeof value === "object" && value !== null;

/** Changes the value that `path` leads to, from the root by the n-th key of each object. Returns false if it leads nowhere. */
function damage(root: Tree, path: readonly number[], change: "drop" | "add" | { readonly value: unknown }): boolean {
  let at = root;
  for (const [depth, n] of path.entries()) {
    const keys = Object.keys(at);
    const key = keys[n % Math.max(1, keys.length)];
    if (key === undefined) return false;
    const next = at[key];
    if (isTree(next) && depth < path.length - 1) {
      at = next;
      continue;
    }
    if (change === "add") at.another = 1;
    else if (change === "drop") delete at[key];
    else at[key] = change.value;
    return true;
  }
  return false;
}

test("the built validator agrees with the schema about plans with one key dropped, added or of another value, anywhere", () => {
  expect(fast(plan)).toBe(true);
  expect(fitsSchema(plan, "exact")).toBe(true);
  let refused = 0;
  const change = fc.oneof(
    fc.constantFrom("drop" as const, "add" as const),
    fc.constantFrom(null, -1, 0, 1.5, "", "send", "compute", "gemm", {}, [], true).map((value) => ({ value })),
  );
  fc.assert(
    fc.property(fc.array(fc.nat(1000), { minLength: 1, maxLength: 9 }), change, (path, how) => {
      const changed = structuredClone(plan) as unknown as Tree;
      fc.pre(damage(changed, path, how));
      const fits = fitsSchema(changed, "exact");
      if (!fits) refused++;
      return fast(changed) === fits;
    }),
    { numRuns: draws(150, 2000) },
  );
  expect(refused).toBeGreaterThan(20);
});
