/** The ops of gated linear units against their plain formulas: the reference writes them as x·σ(z(x)), the formulas here are those of the papers. */
import { expect, test } from "vitest";
import { compile } from "../../src/compile.ts";
import { gatedUnits } from "../../src/ops/gatedUnits.ts";
import { jobOf } from "../support/job.ts";
import { activations } from "../support/plainModel.ts";

const gate = Float32Array.from({ length: 97 }, (_, i) => (i - 48) / 4);
const F = gate.length;
const up = gate.map((_, i) => Math.sin(i) + 1.5);
const dy = gate.map((_, i) => Math.cos(3 * i));
const p = Float32Array.of(0.7);
const place = { start: () => 0, rows: Int32Array.of(1, 0, 0, 0) };
const d = { B: 1, S: 1, E: 1, F };

test("gelu with the tanh approximation has the values that PyTorch gives", () => {
  expect([-1, 0.5, 1, 2].map((x) => Number(activations.geglu(x).toFixed(4)))).toEqual([-0.1588, 0.3457, 0.8412, 1.9546]);
});

test.each(Object.entries(gatedUnits))(
  "%s and its gradients are those of the plain formula",
  (name, { dense, denseGrad, rows, rowsGrad }) => {
    const act = activations[name as keyof typeof gatedUnits];
    const slope = (x: number) => (act(x + 1e-5) - act(x - 1e-5)) / 2e-5;
    const out = () => new Float32Array(F);
    const close = (got: Float32Array, want: (x: number, i: number) => number) => {
      const errors = got.map((v, i) => Math.abs(v - want(gate[i] ?? 0, i)) / Math.max(1, Math.abs(v)));
      expect(Math.max(...errors)).toBeLessThan(1e-6);
    };
    const at = (x: Float32Array, i: number): number => x[i] ?? Number.NaN;

    const y = out();
    dense.cpu({ gate, up, y }, d, place);
    close(y, (x, i) => act(x) * at(up, i));
    const [dgate, dup] = [out(), out()];
    denseGrad.cpu({ gate, up, dy, dgate, dup }, d, place);
    close(dgate, (x, i) => at(dy, i) * at(up, i) * slope(x));
    close(dup, (x, i) => at(dy, i) * act(x));

    rows.cpu({ gate, up, p, y }, d, place);
    close(y, (x, i) => act(x) * at(up, i) * at(p, 0));
    const dp = new Float32Array(1);
    rowsGrad.cpu({ gate, up, p, dy, dgate, dup, dp }, d, place);
    close(dgate, (x, i) => at(dy, i) * at(p, 0) * at(up, i) * slope(x));
    close(dup, (x, i) => at(dy, i) * at(p, 0) * act(x));
    const total = [...gate].reduce((sum, x, i) => sum + at(dy, i) * act(x) * at(up, i), 0);
    expect(dp[0]).toBeCloseTo(total, 4);
  },
);

test("model.activation selects the ops of dense layers, of experts and of shared experts", () => {
  const model = { layers: 2, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8, activation: "geglu" };
  const moe = { experts: 4, top_k: 2, ffn: 8, router: { balance: "none" }, shared: { ffn: 8 }, layers: { first_dense: 1 } };
  const train = { micro_batch: 1, global_batch: 1, steps: 1, optimizer: { lr: 0.01 } };
  const { plan } = compile(jobOf({ name: "geglu", model: { ...model, moe }, train, data: { path: "corpus.txt" } }));
  const used = new Set(plan.kernels.map(({ op }) => op).filter((op) => /glu/.test(op)));
  expect([...used].sort()).toEqual(["geglu", "geglu_grad", "geglu_rows", "geglu_rows_grad"]);
});
