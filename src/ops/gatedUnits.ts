/**
 * Gated linear units: y = x·σ(z(x))·up, where x is the gate and z(x) = x·(linear + cubic·x²). The two coefficients are the whole difference
 * between activations: the formulas below contain them, and the reference and the kernels are derived from the formulas.
 *
 *   swiglu  silu(x)·up, silu(x) = x·σ(x): z = x (Shazeer 2020, arXiv:2002.05202)
 *   geglu   gelu(x)·up, gelu(x) = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the tanh approximation of Hendrycks and Gimpel 2016
 *           (arXiv:1606.08415), which Megatron Core fuses (fused_bias_geglu.py) and Hugging Face calls gelu_pytorch_tanh.
 *           With 1 + tanh(u) = 2·σ(2u): z = 2·√(2/π)·(x + 0.044715·x³)
 *
 * Derivative of x·σ(z): s·(1 + x·z′·(1 − s)), where s = σ(z) and z′ = linear + 3·cubic·x².
 */
import type { Job } from "../../schemas/job.ts";
import { add, type Expr, mul, rowSum, sigmoid, sub, variable } from "./formula.ts";
import { formulaOp, type Grads } from "./op.ts";

type Activation = Job["model"]["activation"];

/** Coefficients of z(x) = x·(linear + cubic·x²). */
interface SigmoidArgument {
  readonly linear: number;
  readonly cubic: number;
}

/** One activation as ops: `dense` for [B,S,F], `rows` for the rows of experts. The ops are named `name`, `name_grad`, `name_rows`, `name_rows_grad`. */
function gatedUnit(name: Activation, { linear, cubic }: SigmoidArgument) {
  /** x · (linear + k·x²) */
  const times = (x: Expr, k: number): Expr => (linear === 1 && k === 0 ? x : mul(x, add(linear, mul(k, x, x))));
  const gateOf = (x: Expr): Expr => sigmoid(times(x, cubic));
  /** The derivative of x·s, divided by s = σ(z(x)). */
  const slope = (x: Expr, s: Expr): Expr => add(1, mul(times(x, 3 * cubic), sub(1, s)));

  const denseGrad = formulaOp({
    name: `${name}_grad`,
    sig: "gate[B,S,F] up[B,S,F] dy[B,S,F] -> dgate[B,S,F] dup[B,S,F]",
    formula({ gate, up, dy }) {
      const s = variable("s", gateOf(gate));
      return { dgate: mul(dy, up, s, slope(gate, s)), dup: mul(dy, gate, s) };
    },
  });
  const dense = formulaOp({
    name,
    sig: "gate[B,S,F] up[B,S,F] -> y[B,S,F]",
    formula: ({ gate, up }) => ({ y: mul(gate, gateOf(gate), up) }),
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
      const s = variable("s", gateOf(gate));
      const dp = rowSum("slope", mul(dy, gate, s, up));
      return { dgate: mul(dy, p, up, s, slope(gate, s)), dup: mul(dy, p, gate, s), dp };
    },
  });
  // the combine weight p is applied inside the activation, as in Megatron Core: the following product is linear, so rows need no later weighting
  const rows = formulaOp({
    name: `${name}_rows`,
    sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] -> y[B~S~E,F]",
    formula: ({ gate, up, p }) => ({ y: mul(gate, gateOf(gate), up, p) }),
    grad({ gate, up, p }, { dy }): Grads {
      const { dgate, dup, dp } = rowsGrad.all({ gate, up, p, dy });
      return { gate: dgate, up: dup, p: dp };
    },
  });
  return { dense, denseGrad, rows, rowsGrad };
}

const gelu = 2 * Math.sqrt(2 / Math.PI);

/** The activations of `model.activation`. */
export const gatedUnits = {
  swiglu: gatedUnit("swiglu", { linear: 1, cubic: 0 }),
  geglu: gatedUnit("geglu", { linear: gelu, cubic: gelu * 0.044715 }),
} satisfies Readonly<Record<Activation, ReturnType<typeof gatedUnit>>>;
