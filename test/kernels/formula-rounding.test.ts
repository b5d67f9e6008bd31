/**
 * In CUDA kernels of formulas each product is rounded, or is one operation with a stated sum: no compiler chooses. Kernels that share a
 * formula, such as an optimizer with and without a cast of the weights, have the same bits.
 */
import { expect, test } from "vitest";
import { cuda } from "../../src/codegen/cuda/text.ts";
import { formulaText } from "../../src/codegen/formulaText.ts";
import { layoutOf, operandsOf } from "../../src/ops/formula.ts";
import { mapFormulaOps } from "../../src/ops/index.ts";

/** Whether a compiler could join a product of the expression and a sum: both are at one level of parentheses, or a value is a product alone. */
function isContractible(expression: string): boolean {
  const tokens = expression.match(/[()?,:]| [-+*/] |[^()?,: ]+/g) ?? [];
  /** What the levels of parentheses contain: products, sums, and whether the level is a value of its own (the whole, or a branch). */
  const levels = [{ product: false, sum: false, isValue: true }];
  let found = false;
  const close = () => {
    const level = levels.pop();
    found ||= level?.product === true && (level.sum || level.isValue);
  };
  for (const token of tokens) {
    const level = levels.at(-1);
    if (token === "(") levels.push({ product: false, sum: false, isValue: false });
    else if (token === ")") close();
    else if (token === "," || token === "?" || token === ":") {
      // a condition is no value
      if (level && token === "?") level.isValue = false;
      close();
      levels.push({ product: false, sum: false, isValue: token !== "," });
    } else if (level && (token === " * " || token === " / ")) level.product = token === " * ";
    else if (level && (token === " + " || token === " - ")) level.sum = true;
  }
  close();
  return found;
}

test("the check finds products that a compiler may join with a sum", () => {
  for (const text of ["a * b + c", "f(c - a * b)", "a * b", "t > 0.0f ? a * b : c"]) expect(isContractible(text), text).toBe(true);
  for (const text of ["fmaf(a * b, c, d) + e", "__fmul_rn(a, b)", "sqrtf(a * b)", "a + b", "a * b / c"])
    expect(isContractible(text), text).toBe(false);
});

/** Sizes of dims: a formula may divide by them. */
const sizes: Readonly<Record<string, number>> = new Proxy({}, { get: () => 128 });
const texts = mapFormulaOps((op) => {
  const results = op.formula(operandsOf(layoutOf(op)), sizes);
  const text = formulaText(cuda, results);
  // a term of a total is added at once, in one operation
  const values = [...text.results].filter(([name]) => results[name]?.kind !== "total").map(([, r]) => r.text);
  return { ...text, values };
});

test.each(Object.entries(texts))("a compiler chooses no rounding of %s", (_, text) => {
  const declared = [...text.once, ...text.row, ...text.stages.flatMap((s) => s.after), ...text.element];
  const values = [...declared.map((line) => line.replace(/^const float \w+ = |;$/g, "")), ...text.values];
  expect(values.filter(isContractible)).toEqual([]);
});
