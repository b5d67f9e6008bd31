/**
 * Activations without a gate: y = f(x) with an activation function f (activations.ts). The formulas contain f, and the reference and the
 * kernels are derived from them.
 */
import type { PlainActivation } from "../../schemas/activations.ts";
import { activationFunctions } from "./activations.ts";
import { mul, rowSum, variable } from "./formula.ts";
import { formulaOp, type Grads } from "./op.ts";

/** One activation as ops: `dense` for [B,S,F], `rows` for the rows of experts with their combine weights p. Named as gated units. */
function plainUnit(name: PlainActivation) {
  const { share, slope } = activationFunctions[name];
  const denseGrad = formulaOp({
    name: `${name}_grad`,
    sig: "x[B,S,F] dy[B,S,F] -> dx[B,S,F]",
    formula: ({ x, dy }) => ({ dx: mul(dy, ...slope(x, variable("s", share(x)))) }),
  });
  const dense = formulaOp({
    name,
    sig: "x[B,S,F] -> y[B,S,F]",
    formula: ({ x }) => ({ y: mul(x, share(x)) }),
    grad: ({ x }, { dy }): Grads => ({ x: denseGrad.of({ x, dy }) }),
  });
  const rowsGrad = formulaOp({
    name: `${name}_rows_grad`,
    sig: "x[B~S~E,F] p[B~S~E] dy[B~S~E,F] -> dx[B~S~E,F] dp[B~S~E]",
    types: { dp: "f32" },
    formula({ x, p, dy }) {
      const s = variable("s", share(x));
      return { dx: mul(dy, p, ...slope(x, s)), dp: rowSum("slope", mul(dy, x, s)) };
    },
  });
  const rows = formulaOp({
    name: `${name}_rows`,
    sig: "x[B~S~E,F] p[B~S~E] -> y[B~S~E,F]",
    formula: ({ x, p }) => ({ y: mul(x, share(x), p) }),
    grad({ x, p }, { dy }): Grads {
      const { dx, dp } = rowsGrad.all({ x, p, dy });
      return { x: dx, p: dp };
    },
  });
  return { dense, denseGrad, rows, rowsGrad };
}

/** The activations of `model.activation` without a gate. */
export const ungatedUnits = {
  gelu: plainUnit("gelu"),
  gelu_tanh: plainUnit("gelu_tanh"),
  squared_relu: plainUnit("squared_relu"),
} satisfies Readonly<Record<PlainActivation, ReturnType<typeof plainUnit>>>;
