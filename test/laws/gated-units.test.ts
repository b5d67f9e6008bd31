/** The ops of activations against their plain formulas: the reference writes them as x·s(x), the formulas here are those of the papers. */
import { expect, test } from "vitest";
import { compile } from "../../src/compile.ts";
import { erf } from "../../src/ops/erf.ts";
import { gatedUnits } from "../../src/ops/gatedUnits.ts";
import { ungatedUnits } from "../../src/ops/ungatedUnits.ts";
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

test("gelu by erf, quick gelu and squared relu have the values that PyTorch gives", () => {
  const values = (name: keyof typeof activations) => [-1, 0.5, 1, 2].map((x) => Number(activations[name](x).toFixed(4)));
  expect(values("gelu")).toEqual([-0.1587, 0.3457, 0.8413, 1.9545]);
  expect(values("quick_geglu")).toEqual([-0.1542, 0.3504, 0.8458, 1.9357]);
  expect(values("squared_relu")).toEqual([0, 0.25, 1, 4]);
});

test("erf has the values of tables, to a few roundings of a double", () => {
  const table = [
    [0.1, 0.1124629160182849],
    [0.5, 0.5204998778130465],
    [1, 0.8427007929497149],
    [2, 0.9953222650189527],
    [3.5, 0.9999992569016276],
  ] as const;
  for (const [x, y] of table) {
    expect(Math.abs(erf(x) - y), `erf(${x})`).toBeLessThan(1e-15);
    expect(erf(-x)).toBe(-erf(x));
  }
  expect([erf(0), erf(7), erf(-1e300), erf(Number.POSITIVE_INFINITY)]).toEqual([0, 1, -1, 1]);
  expect(erf(Number.NaN)).toBeNaN();
});

/** The largest difference between values and those of a function of the elements. */
const expectClose = (got: Float32Array, want: (x: number, i: number) => number) => {
  const errors = got.map((v, i) => Math.abs(v - want(gate[i] ?? 0, i)) / Math.max(1, Math.abs(v)));
  expect(Math.max(...errors)).toBeLessThan(1e-6);
};
const at = (x: Float32Array, i: number): number => x[i] ?? Number.NaN;
const slopeOf = (act: (x: number) => number) => (x: number) => (act(x + 1e-6) - act(x - 1e-6)) / 2e-6;

test.each(Object.entries(gatedUnits))(
  "%s and its gradients are those of the plain formula",
  (name, { dense, denseGrad, rows, rowsGrad }) => {
    const act = activations[name as keyof typeof gatedUnits];
    const slope = slopeOf(act);
    const out = () => new Float32Array(F);
    const close = expectClose;

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

test.each(Object.entries(ungatedUnits))(
  "%s without a gate and its gradients are those of the plain formula",
  (name, { dense, denseGrad, rows, rowsGrad }) => {
    const act = activations[name as keyof typeof ungatedUnits];
    const slope = slopeOf(act);
    const [x, y, dx, dp] = [gate, new Float32Array(F), new Float32Array(F), new Float32Array(1)];
    dense.cpu({ x, y }, d, place);
    expectClose(y, (v) => act(v));
    denseGrad.cpu({ x, dy, dx }, d, place);
    expectClose(dx, (v, i) => at(dy, i) * slope(v));
    rows.cpu({ x, p, y }, d, place);
    expectClose(y, (v) => act(v) * at(p, 0));
    rowsGrad.cpu({ x, p, dy, dx, dp }, d, place);
    expectClose(dx, (v, i) => at(dy, i) * at(p, 0) * slope(v));
    const total = [...gate].reduce((sum, v, i) => sum + at(dy, i) * act(v), 0);
    expect(Math.abs(at(dp, 0) / total - 1)).toBeLessThan(1e-6);
  },
);

test.each(["geglu", "squared_relu"])(
  "model.activation %s selects the ops of dense layers, of experts and of shared experts",
  (activation) => {
    const model = { layers: 2, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8, activation };
    const moe = { experts: 4, top_k: 2, ffn: 8, router: { balance: "none" }, shared: { ffn: 8 }, layers: { first_dense: 1 } };
    const train = { micro_batch: 1, global_batch: 1, steps: 1, optimizer: { lr: 0.01 } };
    const { plan } = compile(jobOf({ name: "units", model: { ...model, moe }, train, data: { path: "corpus.txt" } }));
    const used = new Set(plan.kernels.map(({ op }) => op).filter((op) => /glu|relu/.test(op)));
    expect([...used].sort()).toEqual(["", "_grad", "_rows", "_rows_grad"].map((end) => `${activation}${end}`));
  },
);
