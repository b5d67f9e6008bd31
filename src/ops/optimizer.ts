/**
 * The optimizer step: gradient norm, clipping, and the updates of torch.optim's AdamW, Adam and SGD. Arithmetic is in double precision, storage
 * in f32. `clip` writes a `scale` of 0 if the sum of squares is not finite, and an update with a `scale` of 0 changes neither weights nor
 * moments nor router biases: the device skips the step, and the host reads nothing. Each update exists in two forms: with a constant weight
 * decay (an attribute) and with one that is scheduled (an operand).
 */
import { type Attrs, op } from "./op.ts";

/** Adds the squares of one gradient to `y`. `scale` is 1 / the number of ranks that hold a copy of the parameter. */
export const sumSquares = op({
  name: "sum_squares",
  sig: "g[...] -> y[]",
  inPlace: ["y"],
  types: { y: "f32" },
  cpu({ g, y }, { scale }) {
    let sum = 0;
    for (const x of g) sum += x * x;
    y[0]! += scale! * sum;
  },
});
/** Copies `x` to `y` if `x` is not finite: a non-finite loss makes the sum of squares non-finite, on all ranks after the reduction. */
export const markNonfinite = op({
  name: "mark_nonfinite",
  sig: "x[] -> y[]",
  inPlace: ["y"],
  types: { y: "f32" },
  cpu({ x, y }) {
    if (!Number.isFinite(x[0]!)) y[0] = x[0]!;
  },
});
/** torch.nn.utils.clip_grad_norm_; a `max` of 0 disables clipping. If `sq` is not finite, `scale` is 0 and `norm` is not finite. */
export const clip = op({
  name: "clip",
  sig: "sq[] -> scale[] norm[]",
  cpu({ sq, scale, norm }, { max }) {
    norm[0] = Math.sqrt(sq[0]!);
    scale[0] = Number.isFinite(sq[0]!) ? left(norm[0], max!) : 0;
  },
});
/** Like clip, for gradients of a loss that was multiplied by `by`. */
export const clipScaled = op({
  name: "clip_scaled",
  sig: "sq[] by[] -> scale[] norm[]",
  cpu({ sq, by, scale, norm }, { max }) {
    norm[0] = Math.sqrt(sq[0]!) / by[0]!;
    scale[0] = Number.isFinite(sq[0]!) ? left(norm[0], max!) / by[0]! : 0;
  },
});
const left = (norm: number, max: number): number => (max > 0 ? Math.min(1, max / (norm + 1e-6)) : 1);

// -- adaptive moments; `step` counts from 1

const moments = { inPlace: ["w", "m", "v"], types: { w: "f32", m: "f32", v: "f32" } } as const;

/** Decoupled weight decay: shrinks the weight before the update. */
export const adamw = op({
  name: "adamw",
  sig: "g[...] scale[] lr[] step[] -> w[...] m[...] v[...]",
  ...moments,
  cpu: (t, d) => adaptive(t, d, { shrink: d.decay! }),
});
export const adamwScheduled = op({
  name: "adamw_scheduled",
  sig: "g[...] scale[] lr[] step[] decay[] -> w[...] m[...] v[...]",
  ...moments,
  cpu: (t, d) => adaptive(t, d, { shrink: t.decay[0]! }),
});
/** Adds decay · w, the gradient of decay/2 · w², to the clipped gradient. */
export const adam = op({
  name: "adam",
  sig: "g[...] scale[] lr[] step[] -> w[...] m[...] v[...]",
  ...moments,
  cpu: (t, d) => adaptive(t, d, { pull: d.decay! }),
});
export const adamScheduled = op({
  name: "adam_scheduled",
  sig: "g[...] scale[] lr[] step[] decay[] -> w[...] m[...] v[...]",
  ...moments,
  cpu: (t, d) => adaptive(t, d, { pull: t.decay[0]! }),
});

type Tensors<K extends string> = Readonly<Record<K, Float32Array>>;
/** Whether the step is skipped. */
const isSkipped = ({ scale }: Tensors<"scale">): boolean => scale[0] === 0;

function adaptive(t: Tensors<"g" | "scale" | "lr" | "step" | "w" | "m" | "v">, d: Attrs, { shrink = 0, pull = 0 }): void {
  const { g, scale, lr, step, w, m, v } = t;
  const { beta1, beta2, eps } = d;
  if (isSkipped(t)) return;
  const rate = lr[0]! / (1 - beta1! ** step[0]!);
  const unbias = Math.sqrt(1 - beta2! ** step[0]!);
  const keep = 1 - lr[0]! * shrink;
  for (let i = 0; i < g.length; i++) {
    const x = g[i]! * scale[0]! + pull * w[i]!;
    const mean = beta1! * m[i]! + (1 - beta1!) * x;
    const square = beta2! * v[i]! + (1 - beta2!) * x * x;
    w[i] = w[i]! * keep - (rate * mean) / (Math.sqrt(square) / unbias + eps!);
    m[i] = mean;
    v[i] = square;
  }
}

// -- stochastic gradient descent with decay · w added to the gradient; the momentum m has no dampening: m = momentum · m + g

export const sgd = op({
  name: "sgd",
  sig: "g[...] scale[] lr[] -> w[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  cpu: (t, d) => descend(t, d, d.decay!),
});
export const sgdScheduled = op({
  name: "sgd_scheduled",
  sig: "g[...] scale[] lr[] decay[] -> w[...]",
  inPlace: ["w"],
  types: { w: "f32" },
  cpu: (t, d) => descend(t, d, t.decay[0]!),
});
export const sgdMomentum = op({
  name: "sgd_momentum",
  sig: "g[...] scale[] lr[] -> w[...] m[...]",
  inPlace: ["w", "m"],
  types: { w: "f32", m: "f32" },
  cpu: (t, d) => descend(t, d, d.decay!, t.m),
});
export const sgdMomentumScheduled = op({
  name: "sgd_momentum_scheduled",
  sig: "g[...] scale[] lr[] decay[] -> w[...] m[...]",
  inPlace: ["w", "m"],
  types: { w: "f32", m: "f32" },
  cpu: (t, d) => descend(t, d, t.decay[0]!, t.m),
});

function descend(t: Tensors<"g" | "scale" | "lr" | "w">, d: Attrs, decay: number, m?: Float32Array): void {
  const { g, scale, lr, w } = t;
  if (isSkipped(t)) return;
  for (let i = 0; i < g.length; i++) {
    let x = g[i]! * scale[0]! + decay * w[i]!;
    if (m) {
      x += d.momentum! * m[i]!;
      m[i] = x;
    }
    w[i]! -= lr[0]! * x;
  }
}
