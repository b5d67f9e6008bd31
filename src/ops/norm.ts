/** Root-mean-square norms over the width of the model or of each head: y = x · gain / sqrt(mean(x²) + eps). */
import { type Grads, op } from "./op.ts";

/** RMS norm over the last dim, with a gain. */
export const rmsnorm = op({
  name: "rmsnorm",
  sig: "x[B,S,D!] gain[D!] -> y[B,S,D!]",
  attrs: ["eps"],
  cpu: ({ x, gain, y }, { D, eps }) => normalize(x, gain, y, D, eps),
  grad({ x, gain }, { dy }, a): Grads {
    const { dx, dgain } = rmsnormGrad.all({ x, gain, dy }, a);
    return { x: dx, gain: dgain };
  },
});
/** The gradient of `rmsnorm`. */
export const rmsnormGrad = op({
  name: "rmsnorm_grad",
  sig: "x[B,S,D!] gain[D!] dy[B,S,D!] -> dx[B,S,D!] dgain[D!]",
  attrs: ["eps"],
  types: { dgain: "f32" },
  cpu: ({ x, gain, dy, dx, dgain }, { D, eps }) => normalizeGrad(x, gain, dy, dx, dgain, D, eps),
});

/** RMS norm of each head. */
export const headNorm = op({
  name: "head_norm",
  sig: "x[B,S,H*C] gain[C!] -> y[B,S,H*C]",
  attrs: ["eps"],
  cpu: ({ x, gain, y }, { C, eps }) => normalize(x, gain, y, C, eps),
  grad({ x, gain }, { dy }, a): Grads {
    const { dx, dgain } = headNormGrad.all({ x, gain, dy }, a);
    return { x: dx, gain: dgain };
  },
});
/** The gradient of `headNorm`. */
export const headNormGrad = op({
  name: "head_norm_grad",
  sig: "x[B,S,H*C] gain[C!] dy[B,S,H*C] -> dx[B,S,H*C] dgain[C!]",
  attrs: ["eps"],
  linearIn: "dy",
  types: { dgain: "f32" },
  cpu: ({ x, gain, dy, dx, dgain }, { C, eps }) => normalizeGrad(x, gain, dy, dx, dgain, C, eps),
});

function normalize(x: Float32Array, gain: Float32Array, y: Float32Array, width: number, eps: number): void {
  for (let o = 0; o < x.length; o += width) {
    const scale = inverse(x, o, width, eps);
    for (let c = 0; c < width; c++) y[o + c] = x[o + c]! * scale * gain[c]!;
  }
}

/** Gradient. With r = 1/rms: dx = r·(gain·dy − x·r²·mean(x·gain·dy)), as dr/dx = −x·r³/width; dgain = Σ x·r·dy. */
function normalizeGrad(
  x: Float32Array,
  gain: Float32Array,
  dy: Float32Array,
  dx: Float32Array,
  dgain: Float32Array,
  width: number,
  eps: number,
): void {
  const sum = new Float64Array(width);
  for (let o = 0; o < x.length; o += width) {
    const scale = inverse(x, o, width, eps);
    let dot = 0;
    for (let c = 0; c < width; c++) dot += x[o + c]! * gain[c]! * dy[o + c]!;
    const pull = (dot * scale * scale) / width;
    for (let c = 0; c < width; c++) {
      dx[o + c] = scale * (gain[c]! * dy[o + c]! - x[o + c]! * pull);
      sum[c]! += x[o + c]! * scale * dy[o + c]!;
    }
  }
  for (let c = 0; c < width; c++) dgain[c]! += sum[c]!;
}

function inverse(x: Float32Array, at: number, width: number, eps: number): number {
  let squares = 0;
  for (let c = 0; c < width; c++) squares += x[at + c]! * x[at + c]!;
  return 1 / Math.sqrt(squares / width + eps);
}
