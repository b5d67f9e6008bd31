/**
 * Gated linear units: y = f(gate)·up with an activation function f (activations.ts; Shazeer 2020, arXiv:2002.05202). The formulas contain f,
 * and the reference and the kernels are derived from them.
 */
import type { GatedActivation } from "../../schemas/activations.ts";
import { activationFunctions } from "./activations.ts";
import { mul, rowSum, variable } from "./formula.ts";
import { formulaOp, type Grads } from "./op.ts";

/** One activation as ops: `dense` for [B,S,F], `rows` for the rows of experts. The ops are named `name`, `name_grad`, `name_rows`, `name_rows_grad`. */
function gatedUnit(name: GatedActivation, { share, slope }: (typeof activationFunctions)[keyof typeof activationFunctions]) {
  const denseGrad = formulaOp({
    name: `${name}_grad`,
    sig: "gate[B,S,F] up[B,S,F] dy[B,S,F] -> dgate[B,S,F] dup[B,S,F]",
    formula({ gate, up, dy }) {
      const s = variable("s", share(gate));
      return { dgate: mul(dy, up, ...slope(gate, s)), dup: mul(dy, gate, s) };
    },
  });
  const dense = formulaOp({
    name,
    sig: "gate[B,S,F] up[B,S,F] -> y[B,S,F]",
    formula: ({ gate, up }) => ({ y: mul(gate, share(gate), up) }),
    grad({ gate, up }, { dy }): Grads {
      const { dgate, dup } = denseGrad.all({ gate, up, dy });
      return { gate: dgate, up: dup };
    },
  });
  const rowsGrad = formulaOp({
    name: `${name}_rows_grad`,
    sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] dy[B~S~E,F] -> dgate[B~S~E,F] dup[B~S~E,F] dp[B~S~E]",
    types: { dp: "f32" },
    formula({ gate, up, p, dy }) {
      const s = variable("s", share(gate));
      const dp = rowSum("slope", mul(dy, gate, s, up));
      return { dgate: mul(dy, p, up, ...slope(gate, s)), dup: mul(dy, p, gate, s), dp };
    },
  });
  // the combine weight p is applied inside the activation, as in Megatron Core: the following product is linear, so rows need no later weighting
  const rows = formulaOp({
    name: `${name}_rows`,
    sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] -> y[B~S~E,F]",
    formula: ({ gate, up, p }) => ({ y: mul(gate, share(gate), up, p) }),
    grad({ gate, up, p }, { dy }): Grads {
      const { dgate, dup, dp } = rowsGrad.all({ gate, up, p, dy });
      return { gate: dgate, up: dup, p: dp };
    },
  });
  return { dense, denseGrad, rows, rowsGrad };
}

/** The gated activations of `model.activation`. */
export const gatedUnits = {
  swiglu: gatedUnit("swiglu", activationFunctions.silu),
  geglu: gatedUnit("geglu", activationFunctions.gelu_tanh),
  quick_geglu: gatedUnit("quick_geglu", activationFunctions.quick_gelu),
} satisfies Readonly<Record<GatedActivation, ReturnType<typeof gatedUnit>>>;
