/** The step: the gradients' norm, what clipping leaves of them, and torch.optim.AdamW. Doubles inside, stored as f32. */
import { op } from "./op.ts";

/** Adds up over the parameters; `scale` undoes the copies that many ranks hold of one parameter. */
export const sumSquares = op({
  name: "sum_squares",
  sig: "g[...] -> y[]",
  updates: ["y"],
  types: { y: "f32" },
  cpu({ g, y }, { scale }) {
    let sum = 0;
    for (const x of g) sum += x * x;
    y[0]! += scale! * sum;
  },
});
/** torch.nn.utils.clip_grad_norm_; a `max` of 0 clips nothing. */
export const clip = op({
  name: "clip",
  sig: "sq[] -> scale[] norm[]",
  cpu({ sq, scale, norm }, { max }) {
    norm[0] = Math.sqrt(sq[0]!);
    scale[0] = max! > 0 ? Math.min(1, max! / (Math.sqrt(sq[0]!) + 1e-6)) : 1;
  },
});
/** Decay acts on the weight alone and first; `step` counts from 1. */
export const adamw = op({
  name: "adamw",
  sig: "g[...] scale[] lr[] step[] -> w[...] m[...] v[...]",
  updates: ["w", "m", "v"],
  types: { w: "f32", m: "f32", v: "f32" },
  cpu({ g, scale, lr, step, w, m, v }, { beta1, beta2, eps, decay }) {
    const rate = lr[0]! / (1 - beta1! ** step[0]!);
    const unbias = Math.sqrt(1 - beta2! ** step[0]!);
    const keep = 1 - lr[0]! * decay!;
    for (let i = 0; i < g.length; i++) {
      const x = g[i]! * scale[0]!;
      const mean = beta1! * m[i]! + (1 - beta1!) * x;
      const square = beta2! * v[i]! + (1 - beta2!) * x * x;
      w[i] = w[i]! * keep - (rate * mean) / (Math.sqrt(square) / unbias + eps!);
      m[i] = mean;
      v[i] = square;
    }
  },
});
