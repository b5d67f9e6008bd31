/** Formulas (src/ops/formula.ts): how operands are indexed, and what is derived for the CPU and for both GPU languages. */
import { expect, test } from "vitest";
import { cuda } from "../../src/codegen/cuda/text.ts";
import { formulaText } from "../../src/codegen/formulaText.ts";
import { wgsl } from "../../src/codegen/wgsl/text.ts";
import { auxLoss } from "../../src/ops/balance.ts";
import {
  add,
  div,
  exp,
  greater,
  layoutOf,
  log,
  mul,
  operandIn,
  rowMax,
  rowSum,
  select,
  sigmoid,
  sub,
  variable,
} from "../../src/ops/formula.ts";
import { addBias } from "../../src/ops/gemm.ts";
import { sigmoidGate } from "../../src/ops/moe.ts";
import { formulaOp } from "../../src/ops/op.ts";

const place = { start: () => 0, rows: new Int32Array(1) };

test("operands with fewer dims are values per row, per launch, or tables that repeat along the elements", () => {
  const kinds = (o: Parameters<typeof layoutOf>[0]) => Object.fromEntries([...layoutOf(o).access].map(([name, { kind }]) => [name, kind]));
  expect(kinds(sigmoidGate)).toEqual({ x: "element", gate: "row", y: "element" });
  expect(kinds(addBias)).toEqual({ x: "element", bias: "table", y: "element" });
  expect(kinds(auxLoss)).toEqual({ p: "element", n: "table", y: "launch" });
});

test("the reference reads a table by batch and column, over several blocks of rows", () => {
  const [A, P, S, E] = [2, 3, 700, 2];
  const p = Float32Array.from({ length: A * P * S * E }, (_, i) => (i % 7) - 3);
  const n = Float32Array.of(1, 2, 3, 4);
  const y = Float32Array.of(10);
  auxLoss.cpu({ p, n, y }, { A, P, S, E, c: 0.5 }, place);
  let sum = 0;
  for (const [i, x] of p.entries()) sum += x * n[Math.floor(i / (P * S * E)) * E + (i % E)]!;
  expect(y[0]).toBe(Math.fround(10 + 0.5 * sum));
});

test("a result that replaces an operand is stored after all results are computed", () => {
  const swap = formulaOp({
    name: "add",
    sig: "x[...] -> a[...] b[...]",
    inPlace: ["a", "b"],
    formula: ({ x, a, b }) => ({ a: b, b: add(a, x) }),
  });
  const t = { x: Float32Array.of(1, 1), a: Float32Array.of(2, 3), b: Float32Array.of(4, 5) };
  swap.cpu(t, {}, place);
  expect([...t.a, ...t.b]).toEqual([4, 5, 3, 4]);
});

test("both languages get the same expression: variables at their scope, parentheses where they are needed", () => {
  const [x, gate] = [operandIn(layoutOf(sigmoidGate), "x"), operandIn(layoutOf(sigmoidGate), "gate")];
  const s = variable("s", sigmoid(gate));
  const results = { y: select(greater(x, 0), mul(x, sub(1, s)), div(rowSum("sum", mul(x, x)), add(x, 2))) };
  const [c, w] = [formulaText(cuda, results), formulaText(wgsl, results)];
  expect(c.row).toEqual(["const float s = sigmoid(gate);"]);
  expect(c.stages).toEqual([{ name: "sum", by: "sum", term: "x * x", after: [] }]);
  expect(c.results.get("y")?.text).toBe("x > 0.0f ? __fmul_rn(x, 1.0f - s) : sum / (x + 2.0f)");
  expect(w.row).toEqual(["let s = sigmoid_of(gate);"]);
  expect(w.results.get("y")?.text).toBe("select(sum / (x + 2.0), x * (1.0 - s), x > V(0.0))");
});

test("CUDA divides by a value per row through its reciprocal, WGSL divides", () => {
  const [x, gate] = [operandIn(layoutOf(sigmoidGate), "x"), operandIn(layoutOf(sigmoidGate), "gate")];
  const results = { y: div(x, variable("by", add(gate, 1))) };
  expect(formulaText(cuda, results)).toMatchObject({ row: ["const float by = 1.0f / (gate + 1.0f);"] });
  expect(formulaText(cuda, results).results.get("y")?.text).toBe("__fmul_rn(x, by)");
  expect(formulaText(wgsl, results).results.get("y")?.text).toBe("x / by");
});

test("a result per row follows the reductions of its row, and a maximum of its elements comes before their sum", () => {
  const softmaxNorm = formulaOp({
    name: "add",
    sig: "x[B,F] -> y[B,F] norm[B]",
    formula({ x }) {
      const m = rowMax("m", x);
      const sum = rowSum("sum", exp(sub(x, m)));
      return { y: div(exp(sub(x, m)), sum), norm: add(m, log(sum)) };
    },
  });
  const x = [0.5, -1, 2, 1000, 1001, 999];
  const t = { x: Float32Array.from(x), y: new Float32Array(6), norm: new Float32Array(2) };
  softmaxNorm.cpu(t, { B: 2, F: 3 }, place);
  for (const r of [0, 1]) {
    const row = x.slice(r * 3, r * 3 + 3);
    const m = Math.max(...row);
    const sum = row.reduce((s, v) => s + Math.exp(v - m), 0);
    expect(t.norm[r]).toBe(Math.fround(m + Math.log(sum)));
    expect([...t.y.slice(r * 3, r * 3 + 3)]).toEqual(row.map((v) => Math.fround(Math.exp(v - m) / sum)));
  }
});
