/**
 * The optimizer step: gradient norm, clipping, and the updates of torch.optim's AdamW, Adam, SGD and Muon. Arithmetic is in double precision, storage
 * in f32. `clip` writes a `scale` of 0 if the sum of squares is not finite, and an update with a `scale` of 0 changes neither weights nor
 * moments nor router biases: the device skips the step, and the host reads nothing. Each update exists in two forms: with a constant weight
 * decay (an attribute) and with one that is scheduled (an operand). Forms named `…_cast` also store the new weights in the type of the
 * parameter; those with more than eight operands are missing, because a kernel of WebGPU has no more.
 */
import {
  add,
  approxDiv,
  div,
  type Expr,
  equal,
  finite,
  min,
  mul,
  oneMinusPower,
  select,
  sqrt,
  sub,
  type Term,
  total,
  variable,
} from "./formula.ts";
import { newtonSchulzFlops, orthogonalizeEach } from "./newtonSchulz.ts";
import { formulaOp, op } from "./op.ts";

/** Adds the squares of one gradient to `y`. `scale` is 1 / the number of ranks that hold a copy of the parameter. */
export const sumSquares = formulaOp({
  name: "sum_squares",
  sig: "g[...] -> y[]",
  inPlace: ["y"],
  types: { y: "f32" },
  attrs: ["scale"],
  formula: ({ g }, { scale }) => ({ y: total(mul(g, g), scale) }),
});
/** Copies `x` to `y` if `x` is not finite: a non-finite loss makes the sum of squares non-finite, on all ranks after the reduction. */
export const markNonfinite = formulaOp({
  name: "mark_nonfinite",
  sig: "x[] -> y[]",
  inPlace: ["y"],
  types: { y: "f32" },
  formula: ({ x, y }) => ({ y: select(finite(x), y, x) }),
});
/** torch.nn.utils.clip_grad_norm_; a `max` of 0 disables clipping. If `sq` is not finite, `scale` is 0 and `norm` is not finite. */
export const clip = formulaOp({
  name: "clip",
  sig: "sq[] -> scale[] norm[]",
  attrs: ["max"],
  formula({ sq }, { max }) {
    const norm = variable("all", sqrt(sq));
    return { scale: select(finite(sq), left(norm, max), 0), norm: select(finite(sq), norm, sq) };
  },
});
/** Like clip, for gradients of a loss that was multiplied by `by`. */
export const clipScaled = formulaOp({
  name: "clip_scaled",
  sig: "sq[] by[] -> scale[] norm[]",
  attrs: ["max"],
  formula({ sq, by }, { max }) {
    const norm = variable("all", div(sqrt(sq), by));
    return { scale: select(finite(sq), div(left(norm, max), by), 0), norm: select(finite(sq), norm, sq) };
  },
});
const left = (norm: Expr, max: number): Term => (max > 0 ? min(1, div(max, add(norm, 1e-6))) : 1);

// -- adaptive moments; `step` counts from 1

const constants = ["beta1", "beta2", "eps"] as const;
const moments = { inPlace: ["w", "m", "v"], types: { w: "f32", m: "f32", v: "f32" } } as const;

/** Decoupled weight decay: shrinks the weight before the update. */
export const adamw = formulaOp({
  name: "adamw",
  sig: "g[...] scale[] lr[] step[] -> w[...] m[...] v[...]",
  ...moments,
  attrs: [...constants, "decay"],
  formula: (t, d) => adaptive(t, d, { shrink: d.decay }),
});
/** `adamw` that also writes the parameter in the type of the model. */
export const adamwCast = formulaOp({
  name: "adamw_cast",
  sig: "g[...] scale[] lr[] step[] -> w[...] m[...] v[...] y[...]",
  ...moments,
  attrs: [...constants, "decay"],
  formula: (t, d) => withCopy(adaptive(t, d, { shrink: d.decay })),
});
/** `adamw` with a scheduled weight decay. */
export const adamwScheduled = formulaOp({
  name: "adamw_scheduled",
  sig: "g[...] scale[] lr[] step[] decay[] -> w[...] m[...] v[...]",
  ...moments,
  attrs: constants,
  formula: (t, d) => adaptive(t, d, { shrink: t.decay }),
});
/** Adds decay · w, the gradient of decay/2 · w², to the clipped gradient. */
export const adam = formulaOp({
  name: "adam",
  sig: "g[...] scale[] lr[] step[] -> w[...] m[...] v[...]",
  ...moments,
  attrs: [...constants, "decay"],
  formula: (t, d) => adaptive(t, d, { pull: d.decay }),
});
/** `adam` that also writes the parameter in the type of the model. */
export const adamCast = formulaOp({
  name: "adam_cast",
  sig: "g[...] scale[] lr[] step[] -> w[...] m[...] v[...] y[...]",
  ...moments,
  attrs: [...constants, "decay"],
  formula: (t, d) => withCopy(adaptive(t, d, { pull: d.decay })),
});
/** `adam` with a scheduled weight decay. */
export const adamScheduled = formulaOp({
  name: "adam_scheduled",
  sig: "g[...] scale[] lr[] step[] decay[] -> w[...] m[...] v[...]",
  ...moments,
  attrs: constants,
  formula: (t, d) => adaptive(t, d, { pull: t.decay }),
});

type Operands<K extends string> = Readonly<Record<K, Expr>>;

/** Adds the output `y`, the updated weights in another type. */
const withCopy = <R extends { readonly w: Expr }>(results: R) => ({ ...results, y: results.w });

/** Keeps the value of an output in a step that is skipped. */
const unlessSkipped = ({ scale }: Operands<"scale">, old: Expr, updated: Expr): Expr => select(equal(scale, 0), old, updated);

function adaptive(
  t: Operands<"g" | "scale" | "lr" | "step" | "w" | "m" | "v">,
  { beta1, beta2, eps }: Readonly<Record<(typeof constants)[number], number>>,
  { shrink, pull }: { readonly shrink?: Term; readonly pull?: Term },
) {
  const { g, scale, lr, step, w, m, v } = t;
  const rate = variable("rate", div(lr, oneMinusPower(beta1, step)));
  const unbias = variable("unbias", sqrt(oneMinusPower(beta2, step)));
  const clipped = mul(g, scale);
  const x = variable("x", pull === undefined ? clipped : add(clipped, mul(pull, w)));
  const mean = variable("mean", add(mul(beta1, m), mul(1 - beta1, x)));
  const square = variable("square", add(mul(beta2, v), mul(1 - beta2, x, x)));
  const kept = shrink === undefined ? w : mul(w, variable("keep", sub(1, mul(lr, shrink))));
  const move = approxDiv(mul(rate, mean), add(div(sqrt(square), unbias), eps));
  return { w: unlessSkipped(t, w, sub(kept, move)), m: unlessSkipped(t, m, mean), v: unlessSkipped(t, v, square) };
}

// -- stochastic gradient descent with decay · w added to the gradient; the momentum m has no dampening: m = momentum · m + g

/** Stochastic gradient descent. */
export const sgd = formulaOp({
  name: "sgd",
  sig: "g[...] scale[] lr[] -> w[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  attrs: ["decay"],
  formula: (t, { decay }) => ({ w: unlessSkipped(t, t.w, sub(t.w, mul(t.lr, descent(t, decay)))) }),
});
/** `sgd` that also writes the parameter in the type of the model. */
export const sgdCast = formulaOp({
  name: "sgd_cast",
  sig: "g[...] scale[] lr[] -> w[...] y[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  attrs: ["decay"],
  formula: (t, { decay }) => withCopy({ w: unlessSkipped(t, t.w, sub(t.w, mul(t.lr, descent(t, decay)))) }),
});
/** `sgd` with a scheduled weight decay. */
export const sgdScheduled = formulaOp({
  name: "sgd_scheduled",
  sig: "g[...] scale[] lr[] decay[] -> w[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  formula: (t) => ({ w: unlessSkipped(t, t.w, sub(t.w, mul(t.lr, descent(t, t.decay)))) }),
});
/** `sgdScheduled` that also writes the parameter in the type of the model. */
export const sgdScheduledCast = formulaOp({
  name: "sgd_scheduled_cast",
  sig: "g[...] scale[] lr[] decay[] -> w[...] y[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  formula: (t) => withCopy({ w: unlessSkipped(t, t.w, sub(t.w, mul(t.lr, descent(t, t.decay)))) }),
});
/** Stochastic gradient descent with momentum. */
export const sgdMomentum = formulaOp({
  name: "sgd_momentum",
  sig: "g[...] scale[] lr[] -> w[...] m[...]",
  inPlace: ["w", "m"],
  types: { w: "f32", m: "f32" },
  attrs: ["momentum", "decay"],
  formula: (t, { momentum, decay }) => withMomentum(t, momentum, decay),
});
/** `sgdMomentum` that also writes the parameter in the type of the model. */
export const sgdMomentumCast = formulaOp({
  name: "sgd_momentum_cast",
  sig: "g[...] scale[] lr[] -> w[...] m[...] y[...]",
  inPlace: ["w", "m"],
  types: { w: "f32", m: "f32" },
  attrs: ["momentum", "decay"],
  formula: (t, { momentum, decay }) => withCopy(withMomentum(t, momentum, decay)),
});
/** `sgdMomentum` with a scheduled weight decay. */
export const sgdMomentumScheduled = formulaOp({
  name: "sgd_momentum_scheduled",
  sig: "g[...] scale[] lr[] decay[] -> w[...] m[...]",
  inPlace: ["w", "m"],
  types: { w: "f32", m: "f32" },
  attrs: ["momentum"],
  formula: (t, { momentum }) => withMomentum(t, momentum, t.decay),
});
/** `sgdMomentumScheduled` that also writes the parameter in the type of the model. */
export const sgdMomentumScheduledCast = formulaOp({
  name: "sgd_momentum_scheduled_cast",
  sig: "g[...] scale[] lr[] decay[] -> w[...] m[...] y[...]",
  inPlace: ["w", "m"],
  types: { w: "f32", m: "f32" },
  attrs: ["momentum"],
  formula: (t, { momentum }) => withCopy(withMomentum(t, momentum, t.decay)),
});

const descent = ({ g, scale, w }: Operands<"g" | "scale" | "w">, decay: Term): Expr => add(mul(g, scale), mul(decay, w));

function withMomentum(t: Operands<"g" | "scale" | "lr" | "w" | "m">, momentum: number, decay: Term) {
  const speed = variable("speed", add(mul(momentum, t.m), descent(t, decay)));
  return { w: unlessSkipped(t, t.w, sub(t.w, mul(t.lr, speed))), m: unlessSkipped(t, t.m, speed) };
}

// -- Muon (Jordan et al. 2024): momentum, made orthogonal, then a step with decoupled weight decay. torch.optim.Muon has the same formulas.

/** m = β·m + (1 − β)·g; u is m, or with `nesterov` β·m + (1 − β)·g. In a skipped step m keeps its values and u is 0. */
export const muonMomentum = formulaOp({
  name: "muon_momentum",
  sig: "g[...] scale[] -> u[...] m[...]",
  inPlace: ["m"],
  types: { u: "f32", m: "f32" },
  attrs: ["momentum", "nesterov"],
  formula(t, { momentum, nesterov }) {
    const x = variable("x", mul(1 - momentum, t.g, t.scale));
    const mean = variable("mean", add(mul(momentum, t.m), x));
    return { u: select(equal(t.scale, 0), 0, nesterov > 0 ? add(mul(momentum, mean), x) : mean), m: unlessSkipped(t, t.m, mean) };
  },
});

/** The matrix with the singular vectors of x and singular values near 1, by five Newton–Schulz iterations. It needs the whole matrix. */
export const orthogonalize = op({
  name: "orthogonalize",
  sig: "x[K!,N!] -> y[K,N]",
  types: { y: "f32" },
  flops: ({ K, N }) => newtonSchulzFlops(K, N),
  cpu: ({ x, y }, { K, N, coefficients }) => orthogonalizeEach(x, y, 1, K, N, coefficients),
});
/** Like orthogonalize, for the matrix of each expert. */
export const orthogonalizeExperts = op({
  name: "orthogonalize_experts",
  sig: "x[E,K!,N!] -> y[E,K,N]",
  types: { y: "f32" },
  flops: ({ E, K, N }) => E * newtonSchulzFlops(K, N),
  cpu: ({ x, y }, { E, K, N, coefficients }) => orthogonalizeEach(x, y, E, K, N, coefficients),
});

/** w = w·(1 − lr·decay) − lr·factor·u. */
export const muon = formulaOp({
  name: "muon",
  sig: "u[...] scale[] lr[] -> w[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  attrs: ["factor", "decay"],
  formula: (t, { factor, decay }) => ({ w: alongOrthogonal(t, factor, decay) }),
});
/** `muon` with a scheduled weight decay. */
export const muonScheduled = formulaOp({
  name: "muon_scheduled",
  sig: "u[...] scale[] lr[] decay[] -> w[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  attrs: ["factor"],
  formula: (t, { factor }) => ({ w: alongOrthogonal(t, factor, t.decay) }),
});

function alongOrthogonal(t: Operands<"u" | "scale" | "lr" | "w">, factor: number, decay: Term): Expr {
  const keep = variable("keep", sub(1, mul(t.lr, decay)));
  return unlessSkipped(t, t.w, sub(mul(t.w, keep), mul(t.lr, factor, t.u)));
}
