/**
 * Gated linear units: y = x·σ(z(x))·up, where x is the gate and z(x) = x·(linear + cubic·x²). The two coefficients are the whole difference
 * between activations: the reference below and the kernels (src/codegen/gatedUnitText.ts) are derived from them.
 *
 *   swiglu  silu(x)·up, silu(x) = x·σ(x): z = x (Shazeer 2020, arXiv:2002.05202)
 *   geglu   gelu(x)·up, gelu(x) = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the tanh approximation of Hendrycks and Gimpel 2016
 *           (arXiv:1606.08415), which Megatron Core fuses (fused_bias_geglu.py) and Hugging Face calls gelu_pytorch_tanh.
 *           With 1 + tanh(u) = 2·σ(2u): z = 2·√(2/π)·(x + 0.044715·x³)
 *
 * Derivative of x·σ(z): s·(1 + x·z′·(1 − s)), where s = σ(z) and z′ = linear + 3·cubic·x².
 */
import type { Job } from "../../schemas/job.ts";
import { type Grads, op } from "./op.ts";

type Activation = Job["model"]["activation"];

/** Coefficients of z(x) = x·(linear + cubic·x²). */
export interface SigmoidArgument {
  readonly linear: number;
  readonly cubic: number;
}

/** σ(x) = 1 / (1 + e⁻ˣ) in double precision. */
export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

/** One activation as ops: `dense` for [B,S,F], `rows` for the rows of experts. The ops are named `name`, `name_grad`, `name_rows`, `name_rows_grad`. */
function gatedUnit(name: Activation, argument: SigmoidArgument) {
  const { linear, cubic } = argument;
  const factor = cubic === 0 ? () => linear : (x: number) => linear + cubic * x * x;
  const slope = cubic === 0 ? () => linear : (x: number) => linear + 3 * cubic * x * x;
  const gateOf = (x: number): number => sigmoid(x * factor(x));

  const denseGrad = op({
    name: `${name}_grad`,
    sig: "gate[B,S,F] up[B,S,F] dy[B,S,F] -> dgate[B,S,F] dup[B,S,F]",
    cpu({ gate, up, dy, dgate, dup }) {
      for (let i = 0; i < dy.length; i++) {
        const x = gate[i]!;
        const s = gateOf(x);
        dgate[i] = dy[i]! * up[i]! * s * (1 + x * slope(x) * (1 - s));
        dup[i] = dy[i]! * x * s;
      }
    },
  });
  const dense = op({
    name,
    sig: "gate[B,S,F] up[B,S,F] -> y[B,S,F]",
    cpu({ gate, up, y }) {
      for (let i = 0; i < y.length; i++) y[i] = gate[i]! * gateOf(gate[i]!) * up[i]!;
    },
    grad({ gate, up }, { dy }): Grads {
      const { dgate, dup } = denseGrad.all({ gate, up, dy });
      return { gate: dgate, up: dup };
    },
  });
  const rowsGrad = op({
    name: `${name}_rows_grad`,
    sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] dy[B~S~E,F] -> dgate[B~S~E,F] dup[B~S~E,F] dp[B~S~E]",
    types: { dp: "f32" },
    cpu({ gate, up, p, dy, dgate, dup, dp }, { F }, { rows: existing }) {
      for (let r = 0; r < existing[0]!; r++) {
        let sum = 0;
        for (let i = r * F; i < r * F + F; i++) {
          const x = gate[i]!;
          const s = gateOf(x);
          dgate[i] = dy[i]! * p[r]! * up[i]! * s * (1 + x * slope(x) * (1 - s));
          dup[i] = dy[i]! * p[r]! * x * s;
          sum += dy[i]! * x * s * up[i]!;
        }
        dp[r] = sum;
      }
    },
  });
  // the combine weight p is applied inside the activation, as in Megatron Core: the following product is linear, so rows need no later weighting
  const rows = op({
    name: `${name}_rows`,
    sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] -> y[B~S~E,F]",
    cpu({ gate, up, p, y }, { F }, { rows: existing }) {
      for (let i = 0; i < existing[0]! * F; i++) y[i] = gate[i]! * gateOf(gate[i]!) * up[i]! * p[Math.floor(i / F)]!;
    },
    grad({ gate, up, p }, { dy }): Grads {
      const { dgate, dup, dp } = rowsGrad.all({ gate, up, p, dy });
      return { gate: dgate, up: dup, p: dp };
    },
  });
  return { argument, dense, denseGrad, rows, rowsGrad };
}

const gelu = 2 * Math.sqrt(2 / Math.PI);

/** The activations of `model.activation`. */
export const gatedUnits = {
  swiglu: gatedUnit("swiglu", { linear: 1, cubic: 0 }),
  geglu: gatedUnit("geglu", { linear: gelu, cubic: gelu * 0.044715 }),
} satisfies Readonly<Record<Activation, ReturnType<typeof gatedUnit>>>;
