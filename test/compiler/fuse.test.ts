/** Fusion: which instructions one instruction replaces, and that no number changes by more than its rounding. */
import { describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { bytesOf } from "../../schemas/dtypes.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { type Fusion, fusions } from "../../src/codegen/targetNames.ts";
import { cpu, loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { distance, fixture, jobOf } from "../support/job.ts";

const jobWith = (model: object, parallel: object = {}, train: object = {}) =>
  jobOf({
    name: "fused",
    model: { layers: 2, hidden: 32, ffn: 48, heads: 8, kv_heads: 4, head_dim: 8, vocab: 256, seq: 16, ...model },
    parallel,
    train: { global_batch: 4, steps: 2, precision: "fp32", init: { std: 0.2 }, optimizer: { lr: 1e-2 }, ...train },
    data: { path: "corpus.txt" },
  });
const moe = { moe: { experts: 8, top_k: 2, ffn: 16, router: { balance: "aux_loss", aux_coeff: 0.05 } } };

const planOf = (job: ReturnType<typeof jobOf>, fuses: boolean | readonly Fusion[]) =>
  compile(job, { target: fuses === false ? cpu : { ...cpu, fuses: fuses === true ? fusions : fuses } }).plan;
/** How often a plan runs each op that only one of the two plans has so often. */
const opsOf = (plan: ReturnType<typeof planOf>): Record<string, number> => {
  const counts: Record<string, number> = {};
  for (const i of plan.programs.flatMap(instructionsOf)) if (i.kind === "compute") counts[i.op] = (counts[i.op] ?? 0) + 1;
  return counts;
};
function changes(job: ReturnType<typeof jobOf>, fuses: true | readonly Fusion[] = true): Record<string, number> {
  const [before, after] = [opsOf(planOf(job, false)), opsOf(planOf(job, fuses))];
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].sort();
  return Object.fromEntries(names.map((n) => [n, (after[n] ?? 0) - (before[n] ?? 0)] as const).filter(([, n]) => n !== 0));
}

async function train(plan: ReturnType<typeof planOf>) {
  const run = await openRun(plan, { baseDir: fixture("") });
  const steps = [await run.step(), await run.step()];
  const gradients = await run.gradients();
  await run.close();
  return { losses: steps.map(({ loss, grad_norm }) => [loss, grad_norm] as const), gradients };
}

const others = fusions.filter((name) => name !== "tensor_lists");
test("sums of input gradients become one product, norms add the residual stream, the loss reads logits once, swiglu is not kept, and the products beside it compute it", () => {
  expect(changes(jobWith({}), others)).toMatchInlineSnapshot(`
    {
      "add": -14,
      "gemm": -6,
      "gemm_dgrad": -12,
      "gemm_dgrad_pair": 2,
      "gemm_dgrad_swiglu": 2,
      "gemm_dgrad_triple": 2,
      "gemm_pair": 2,
      "gemm_swiglu": 2,
      "gemm_wgrad": -8,
      "gemm_wgrad_pair": 4,
      "rmsnorm": -4,
      "rmsnorm_grad": -4,
      "rmsnorm_grad_add": 4,
      "rmsnorm_sum": 4,
      "row_max": -1,
      "softmax_statistics": 1,
      "softmax_terms": -1,
      "swiglu": -2,
      "swiglu_grad": -2,
    }
  `);
  expect(changes(jobWith(moe), others)).toMatchInlineSnapshot(`
    {
      "add": -16,
      "gemm": -4,
      "gemm_dgrad": -6,
      "gemm_dgrad_triple": 2,
      "gemm_pair": 2,
      "gemm_wgrad": -4,
      "gemm_wgrad_pair": 2,
      "grouped_dgrad": -6,
      "grouped_dgrad_pair": 2,
      "grouped_dgrad_swiglu": 2,
      "grouped_gemm": -2,
      "grouped_gemm_swiglu": 2,
      "grouped_wgrad": -4,
      "grouped_wgrad_pair": 2,
      "rmsnorm": -2,
      "rmsnorm_grad": -4,
      "rmsnorm_grad_add": 4,
      "rmsnorm_sum": 2,
      "row_max": -1,
      "softmax_statistics": 1,
      "softmax_terms": -1,
      "swiglu_rows": -2,
      "swiglu_rows_grad": -2,
      "unpermute": -4,
      "unpermute_add": 4,
    }
  `);
});

test("a norm that follows a sum of two sums reads all three addends, as does the gradient of a norm", () => {
  const { moe: of } = moe;
  const counts = changes(
    jobWith({ moe: { ...of, shared: { ffn: 16 }, router: { ...of.router, precision: "fp32" } } }, {}, { precision: "bf16" }),
  );
  expect(Object.fromEntries(Object.entries(counts).filter(([op]) => /add|rmsnorm/.test(op)))).toMatchInlineSnapshot(`
    {
      "add": -22,
      "rmsnorm": -4,
      "rmsnorm_grad": -4,
      "rmsnorm_grad_add": 2,
      "rmsnorm_grad_add_pair": 2,
      "rmsnorm_sum": 4,
      "unpermute_add": 4,
    }
  `);
});

test("the input gradient of a gate of one column stays apart from those of the shared experts, whose kernels need aligned rows", () => {
  const { moe: of } = moe;
  const counts = changes(jobWith({ moe: { ...of, shared: { ffn: 16, gate: true } } }));
  expect(Object.fromEntries(Object.entries(counts).filter(([op]) => /^gemm_dgrad/.test(op)))).toMatchInlineSnapshot(`
    {
      "gemm_dgrad": -8,
      "gemm_dgrad_swiglu": 2,
      "gemm_dgrad_triple": 2,
    }
  `);
  const gated = planOf(jobWith({ moe: { ...of, shared: { ffn: 16, gate: true } } }), true).programs.flatMap(instructionsOf);
  const depths = gated.flatMap((i) =>
    i.kind === "compute" && /_dgrad_(pair|triple)$/.test(i.op) ? ["N", "F", "D"].flatMap((dim) => i.dims[dim]?.[0] ?? []) : [],
  );
  expect(depths.length).toBeGreaterThan(0);
  expect(depths.flat()).not.toContain(1);
});

test("norms of heads rotate them, and so do their gradients", () => {
  const counts = changes(jobWith({ qk_norm: "head" }));
  expect(Object.fromEntries(Object.entries(counts).filter(([op]) => /head|rope/.test(op)))).toMatchInlineSnapshot(`
    {
      "head_norm": -4,
      "head_norm_grad": -4,
      "head_norm_rope": 4,
      "head_norm_rope_grad": 4,
      "rope": -8,
    }
  `);
  expect(changes(jobWith({ qk_norm: "head", rope: { theta: 100, fraction: 0.5 } })).rope).toBe(undefined);
});

test("the sum of a token's rows adds the residual stream forward and the gradient of the router backward, where norms do not", () => {
  expect(changes(jobWith(moe), ["combine"])).toMatchInlineSnapshot(`
    {
      "add": -4,
      "unpermute": -4,
      "unpermute_add": 4,
    }
  `);
  // ranks of experts have partial sums of all tokens, which are reduced before anything is added
  const gathered = { moe: { ...moe.moe, dispatch: "all_gather" } };
  expect(changes(jobWith(gathered, { world: 2, expert: 2, data: 2 }), ["combine"])).toMatchInlineSnapshot(`{}`);
});

test("activations of experts are tokens, gate and up where copies of tokens are made again", () => {
  const recompute = { recompute: { mode: "selective", modules: ["moe_permute"] } };
  const job = jobWith(moe, {}, recompute);
  const activation = (fuses: boolean) => planOf(job, fuses).programs[0]!.buffers.filter((b) => b.kind === "activation" && /moe/.test(b.id));
  const rows = (fuses: boolean) => activation(fuses).flatMap(({ id, ragged, shape }) => (ragged > 0 && shape.length > 1 ? [id] : []));
  expect(rows(false)).toContain("layers.0.moe.swiglu");
  expect(rows(true)).toEqual(["layers.0.moe.w1", "layers.0.moe.w3", "layers.1.moe.w1", "layers.1.moe.w3"]);
});

test("activations of an MoE layer of 32768 tokens of 4096, 128 experts of 1024, 8 of them a token, on Hopper: 1.29 GiB where copies of tokens are made again", async () => {
  const target = await loadTarget("cuda:sm_90a");
  const [seq, hidden, ffn] = [32768, 4096, 1024];
  const bytes = (recompute: object) => {
    const model = { layers: 1, hidden, ffn, head_dim: 512, seq, moe: { experts: 128, top_k: 8, ffn, router: { balance: "none" } } };
    const { programs } = compile(jobWith(model, {}, { global_batch: 1, precision: "bf16", ...recompute }), { target }).plan;
    const kept = programs[0]?.buffers.filter(({ id, kind }) => kind === "activation" && /\.moe\.|mlp\.norm$/.test(id)) ?? [];
    return kept.reduce((sum, b) => sum + elementsOf(b.shape) * bytesOf[b.dtype], 0);
  };
  // tokens; gate and up; the router's scores and choices, the index of rows and their weights
  const rows = 8 * seq;
  const least = 2 * seq * hidden + 2 * 2 * rows * ffn + 2 * 4 * seq * 128 + 4 * (1 + 3 * rows + 129) + 4 * rows;
  const again = bytes({ recompute: { mode: "selective", modules: ["moe_permute"] } });
  expect(again).toBe(least);
  expect(again / 2 ** 30).toBeCloseTo(1.285, 3);
  expect(bytes({}) - again).toBe(2 * rows * hidden);
});

const meshes = {
  "one rank": {},
  "tensor 2 with sequence": { world: 2, tensor: 2, sequence: true },
  "two stages with weight gradients of their own": { world: 2, pipeline: 2, schedule: "zero_bubble" },
};

test("with weight gradients of their own, backward returns the output of swiglu for them: no gradient of swiglu is apart from its product", () => {
  const counts = changes(jobWith(moe, meshes["two stages with weight gradients of their own"]));
  expect(Object.fromEntries(Object.entries(counts).filter(([op]) => /swiglu/.test(op)))).toMatchInlineSnapshot(`
    {
      "grouped_dgrad_swiglu": 2,
      "grouped_gemm_swiglu": 2,
      "swiglu_rows": -2,
      "swiglu_rows_grad": -2,
    }
  `);
});
describe.each(Object.entries(meshes))("%s", (_, parallel) => {
  test.each([
    ["dense", { qk_norm: "head" }],
    ["experts", moe],
    ["experts and a shared one", { moe: { ...moe.moe, shared: { ffn: 16 } } }],
  ])("%s: losses and gradients are those of the program that is not fused", async (_, model) => {
    const job = jobWith(model, parallel);
    const [plain, fused] = [await train(planOf(job, false)), await train(planOf(job, true))];
    for (const [n, [loss, norm]] of plain.losses.entries()) {
      expect(Math.abs((fused.losses[n]?.[0] ?? 0) / loss - 1)).toBeLessThan(1e-6);
      expect(Math.abs((fused.losses[n]?.[1] ?? 0) / norm - 1)).toBeLessThan(1e-5);
    }
    for (const [name, g] of plain.gradients) expect(distance(fused.gradients.get(name)?.data ?? [], g.data), name).toBeLessThan(1e-5);
  });
  test("experts, without the sums of norms: losses are those of the program that is not fused", async () => {
    const job = jobWith(moe, parallel);
    const [plain, fused] = [await train(planOf(job, false)), await train(planOf(job, ["sums", "activations", "epilogues", "combine"]))];
    for (const [n, [loss]] of plain.losses.entries()) expect(Math.abs((fused.losses[n]?.[0] ?? 0) / loss - 1)).toBeLessThan(1e-6);
    for (const [name, g] of plain.gradients) expect(distance(fused.gradients.get(name)?.data ?? [], g.data), name).toBeLessThan(1e-5);
  });
});

test("the exchanges of sequence parallelism are divided as in the program that is not fused, also before keys and values in one launch", async () => {
  const job = jobWith({}, { world: 2, tensor: 2, sequence: true, tensor_overlap: 2 });
  const [plain, fused] = [planOf(job, false), planOf(job, true)];
  const exchanges = ({ programs }: typeof plain) =>
    programs.flatMap(instructionsOf).flatMap((i) => (i.kind === "collective" && /\.part\d$/.test(i.id) ? [i.id] : []));
  expect(exchanges(fused)).toEqual(exchanges(plain));
  expect(exchanges(plain).filter((id) => id.includes("attn.norm"))).toHaveLength(4);
  expect(opsOf(fused)).toMatchObject({ gemm_pair: 4 });
  const [want, got] = [await train(plain), await train(fused)];
  for (const [n, [loss]] of want.losses.entries()) expect(Math.abs((got.losses[n]?.[0] ?? 0) / loss - 1)).toBeLessThan(1e-6);
  for (const [name, g] of want.gradients) expect(distance(got.gradients.get(name)?.data ?? [], g.data), name).toBeLessThan(1e-5);
});
