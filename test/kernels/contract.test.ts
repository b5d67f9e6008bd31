/** The contract of kernels has the cases that plans have, and finds wrong kernels. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import type { OpName } from "../../schemas/opNames.ts";
import { cudaKernels } from "../../src/codegen/cuda/index.ts";
import { wgslKernels } from "../../src/codegen/wgsl/index.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import * as fused from "../../src/ops/fused.ts";
import { ops } from "../../src/ops/index.ts";
import { root } from "../support/checkout.ts";
import { type Buffers, casesOf, type Executor, mixtures } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { sets, sizesAt, variantsOf } from "../support/contractSizes.ts";
import { messageDrafts } from "../support/transportCases.ts";

test("every op of the table has a kernel on every device; fused ops only where programs are fused", () => {
  const lacking = (kernels: object) => Object.keys(ops).filter((name) => !(name in kernels));
  const fusedNames = Object.values(fused).map(({ name }) => name);
  expect({ webgpu: lacking(wgslKernels), cuda: lacking(cudaKernels) }).toEqual({ webgpu: fusedNames, cuda: [] });
  expect(Object.keys({ ...wgslKernels, ...cudaKernels }).filter((name) => !Object.hasOwn(ops, name))).toEqual([]);
});

test("the sizes of a case have every dim and attribute of its op, also those that only the full tier takes", () => {
  const missing = Object.values(ops)
    .filter(({ name }) => !(name in messageDrafts))
    .flatMap(({ name, inputs, outputs, attrs = [] }) => {
      const operands = [...inputs, ...outputs].filter((o) => !o.any && o.name !== "needed");
      const names = [...operands.flatMap((o) => o.dimSpecs.flatMap((d) => [d.dim, ...d.inner])), ...attrs];
      const hasRows = [...inputs, ...outputs].some((o) => o.ragged);
      const isTaken = ({ only, rows }: (typeof sets)[string]): boolean => (only?.test(name) ?? true) && (hasRows || rows !== "none");
      const taken = Object.entries(sets).flatMap(([set, own]) => (isTaken(own) ? [set] : []));
      return taken.flatMap((set) =>
        variantsOf(name).flatMap((variant) => {
          const sizes = { ...sizesAt(name, set), ...variant };
          return names.filter((n) => !(n in sizes)).map((n) => `${name} ${set} ${n}`);
        }),
      );
    });
  expect([...new Set(missing)]).toEqual([]);
});

const router = (keys: Readonly<Record<string, unknown>>): string[] =>
  Object.entries(keys).map(([key, value]) => `model.moe.router.${key}=${JSON.stringify(value)}`);
test.each([
  ["as it is", []],
  ["latent attention", ["model.mla={q_rank: 8, kv_rank: 8, nope_dim: 6, rope_dim: 2, v_dim: 8}", "model.kv_heads=4", "model.head_dim=8"]],
  ["biases", ["model.qkv_bias=true", "model.out_bias=true"]],
  [
    "a router in fp32, with a bias and losses",
    router({
      ...{ score: "sigmoid", precision: "fp32", expert_bias: true },
      ...{ balance: ["seq_aux_loss", "global_aux_loss"], aux_coeff: [0.01, 0.01] },
    }),
  ],
  [
    "groups and a capacity",
    [...router({ score: "sqrt_softplus", groups: 4, group_top_k: 2, z_coeff: 0.001 }), "model.moe.capacity={factor: 1}"],
  ],
  ["Sinkhorn's method", router({ balance: "sinkhorn", aux_coeff: 0, normalize_top_k: false })],
  ["quantiles", router({ balance: "quantile", aux_coeff: 0, precision: "fp32" })],
  ["experts that choose", router({ type: "expert_choice", aux_coeff: 0 })],
  ["even loads", router({ force: "uniform" })],
  [
    "shared experts, a latent width, a dense layer",
    ["model.moe.shared={ffn: 64, gate: true}", "model.moe.latent=32", "model.moe.layers=[0, 1]"],
  ],
])("contract cases in half precision have the types of a plan: %s", (_, sets) => {
  const text = readFileSync(join(root, "plans/tiny-mixtral/job.yaml"), "utf8").replace("precision: fp32", "precision: bf16");
  const { plan } = compile(readJob(text, "job.yaml", sets).job!);
  const asked = (op: OpName) => new Set(mixtures(ops[op], "bf16").map((types) => Object.values(types).join(".")));
  const missing = plan.kernels.filter((k) => k.op !== "weights" && !asked(k.op).has(k.dtypes)).map((k) => `${k.op} ${k.dtypes}`);
  expect(missing).toEqual([]);
});

const made = { source: "", launches: [] };
/** Returns an executor that changes the results of the reference. */
const answering = (want: Readonly<Buffers>, change: (all: Buffers) => void): Executor => ({
  name: "answers",
  async run(_made, _use, data) {
    const all = Object.fromEntries(Object.entries(data).map(([n, x]) => [n, x.slice()]));
    for (const [n, x] of Object.entries(want)) all[n]!.set(x);
    change(all);
    return all;
  },
});

test("a correct kernel passes; one with a small error, an unwritten element or a write to an input fails", async () => {
  for (const name of ["gemm", "rmsnorm_grad", "swiglu_rows", "permute", "top_k_mask", "adamw", "split_rows"] as const) {
    const [c] = casesOf(ops[name], "bf16");
    const run = (change: (all: Buffers) => void) => hold(answering(c!.want, change), made, c!);
    const out = ops[name].outputs[0]!.name;
    const input = ops[name].inputs[0]!.name;
    await run(() => {});
    await expect(run((all) => all[out]!.set([all[out]![3]! * 1.001 + 1e-3 + Number(all[out] instanceof Int32Array)], 3))).rejects.toThrow(
      `${out}[3]`,
    );
    await expect(run((all) => all[out]!.set([all[out] instanceof Int32Array ? -7 : Number.NaN], 2))).rejects.toThrow(out);
    await expect(run((all) => all[input]!.set([9], 0))).rejects.toThrow(`${input} is only read`);
  }
});

test("rows that a kernel makes are compared with their offsets", async () => {
  const c = casesOf(ops.permute, "bf16").find((x) => x.use.makesRows)!;
  for (const at of [0, 1, c.data.rows!.length - 1])
    await expect(
      hold(
        answering(c.want, (all) => all.rows!.set([77], at)),
        made,
        c,
      ),
    ).rejects.toThrow("rows");
});
