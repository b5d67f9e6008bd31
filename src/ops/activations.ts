/**
 * Activation functions f(x) = x·s(x) of the feed-forward part. The formula of s and the derivative of f are the whole difference between
 * them: gated units (gatedUnits.ts) and ungated units (ungatedUnits.ts) are made from these, and so are the reference and the kernels.
 *
 *   silu          s = σ(x)
 *   gelu          s = Φ(x), the normal distribution, by erf (Hendrycks and Gimpel 2016, arXiv:1606.08415): torch's default
 *   gelu_tanh     its tanh approximation, s = (1 + tanh(u))/2 = σ(2u), u = √(2/π)·(x + 0.044715·x³), which Megatron Core fuses with biases and
 *                 Hugging Face calls gelu_pytorch_tanh
 *   quick_gelu    s = σ(1.702·x)
 *   squared_relu  s = max(x, 0) (Primer, arXiv:2109.08668)
 */
import { add, type Expr, erf, exp, max, mul, sigmoid, sub } from "./formula.ts";

/** f(x) = x·share(x). */
interface ActivationFunction {
  readonly share: (x: Expr) => Expr;
  /** Factors of f′(x); s = share(x). */
  readonly slope: (x: Expr, s: Expr) => readonly (Expr | number)[];
}

/** s = σ(z), z = x·(linear + cubic·x²): f′ = s·(1 + x·z′·(1 − s)), x·z′ = x·(linear + 3·cubic·x²). */
function logistic({ linear, cubic = 0 }: { readonly linear: number; readonly cubic?: number }): ActivationFunction {
  /** x · (linear + k·x²) */
  const times = (x: Expr, k: number): Expr => (k !== 0 ? mul(x, add(linear, mul(k, x, x))) : linear === 1 ? x : mul(x, linear));
  return {
    share: (x) => sigmoid(times(x, cubic)),
    slope: (x, s) => [s, add(1, mul(times(x, 3 * cubic), sub(1, s)))],
  };
}

/** Of GELU's tanh approximation: 2·√(2/π). */
const STEEP = 2 * Math.sqrt(2 / Math.PI);

/** The formulas of activations. */
/** The functions by name. */
export const activationFunctions = {
  silu: logistic({ linear: 1 }),
  gelu_tanh: logistic({ linear: STEEP, cubic: STEEP * 0.044715 }),
  quick_gelu: logistic({ linear: 1.702 }),
  // Φ′ is the density of the normal distribution: f′ = Φ(x) + x·e^(−x²/2)/√(2π)
  gelu: {
    share: (x) => mul(0.5, add(1, erf(mul(x, Math.SQRT1_2)))),
    slope: (x, s) => [add(s, mul(x, 1 / Math.sqrt(2 * Math.PI), exp(mul(-0.5, x, x))))],
  },
  // x·max(x, 0) = max(x, 0)²
  squared_relu: { share: (x) => max(x, 0), slope: (_, s) => [2, s] },
} satisfies Readonly<Record<string, ActivationFunction>>;
