/**
 * Norms over the width of the model or of each head. Root-mean-square: y = x · gain / sqrt(mean(x²) + eps). Layer norm: the same of x less its
 * mean, plus a bias. With the attribute `offset` 1 the gain is stored less 1. Norms have no formula (formula.ts): a gain is an operand per column,
 * its gradient a sum over columns, and heads are rows within a dim.
 */
import { type Grads, op } from "./op.ts";

/** RMS norm over the last dim, with a gain. */
export const rmsnorm = op({
  name: "rmsnorm",
  sig: "x[B,S,D!] gain[D!] -> y[B,S,D!]",
  attrs: ["eps"],
  cpu: ({ x, gain, y }, { D, eps, offset }) => normalize({ x, gain, y }, { width: D, eps, offset }),
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
  cpu: ({ x, gain, dy, dx, dgain }, { D, eps, offset }) => normalizeGrad({ x, gain, dy, dx, dgain }, { width: D, eps, offset }),
});

/** RMS norm of each head. */
export const headNorm = op({
  name: "head_norm",
  sig: "x[B,S,H*C] gain[C!] -> y[B,S,H*C]",
  attrs: ["eps"],
  cpu: ({ x, gain, y }, { C, eps, offset }) => normalize({ x, gain, y }, { width: C, eps, offset }),
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
  cpu: ({ x, gain, dy, dx, dgain }, { C, eps, offset }) => normalizeGrad({ x, gain, dy, dx, dgain }, { width: C, eps, offset }),
});

/** Layer norm over the width of the model: y = (x − mean) · gain / sqrt(variance + eps) + bias. */
export const layernorm = op({
  name: "layernorm",
  sig: "x[B,S,D!] gain[D!] bias[D!] -> y[B,S,D!]",
  attrs: ["eps"],
  cpu: ({ x, gain, bias, y }, { D, eps, offset }) => normalize({ x, gain, bias, y }, { width: D, eps, offset }),
  grad({ x, gain }, { dy }, a): Grads {
    const { dx, dgain, dbias } = layernormGrad.all({ x, gain, dy }, a);
    return { x: dx, gain: dgain, bias: dbias };
  },
});
/** Gradient of `layernorm`. */
export const layernormGrad = op({
  name: "layernorm_grad",
  sig: "x[B,S,D!] gain[D!] dy[B,S,D!] -> dx[B,S,D!] dgain[D!] dbias[D!]",
  attrs: ["eps"],
  types: { dgain: "f32", dbias: "f32" },
  cpu: ({ x, gain, dy, dx, dgain, dbias }, { D, eps, offset }) =>
    normalizeGrad({ x, gain, dy, dx, dgain, dbias }, { width: D, eps, offset }),
});

/** Layer norm of each head; heads share gain and bias. */
export const headLayernorm = op({
  name: "head_layernorm",
  sig: "x[B,S,H*C] gain[C!] bias[C!] -> y[B,S,H*C]",
  attrs: ["eps"],
  cpu: ({ x, gain, bias, y }, { C, eps, offset }) => normalize({ x, gain, bias, y }, { width: C, eps, offset }),
  grad({ x, gain }, { dy }, a): Grads {
    const { dx, dgain, dbias } = headLayernormGrad.all({ x, gain, dy }, a);
    return { x: dx, gain: dgain, bias: dbias };
  },
});
/** Gradient of `head_layernorm`. */
export const headLayernormGrad = op({
  name: "head_layernorm_grad",
  sig: "x[B,S,H*C] gain[C!] dy[B,S,H*C] -> dx[B,S,H*C] dgain[C!] dbias[C!]",
  attrs: ["eps"],
  linearIn: "dy",
  types: { dgain: "f32", dbias: "f32" },
  cpu: ({ x, gain, dy, dx, dgain, dbias }, { C, eps, offset }) =>
    normalizeGrad({ x, gain, dy, dx, dgain, dbias }, { width: C, eps, offset }),
});

interface Rows {
  readonly width: number;
  readonly eps: number;
  readonly offset: number | undefined;
}
type Arrays<Name extends string> = Readonly<Record<Name, Float32Array>>;
/** A layer norm has a bias. */
type Biased<Name extends string> = { readonly [N in Name]?: Float32Array };

function normalize({ x, gain, y, bias }: Arrays<"x" | "gain" | "y"> & Biased<"bias">, { width, eps, offset = 0 }: Rows): void {
  for (let o = 0; o < x.length; o += width) {
    const { scale, mean } = moments(x, o, width, eps, bias !== undefined);
    for (let c = 0; c < width; c++) y[o + c] = (x[o + c]! - mean) * scale * (offset + gain[c]!) + (bias?.[c] ?? 0);
  }
}

/**
 * Gradient. With r = 1/rms: dx = r·(gain·dy − x·r²·mean(x·gain·dy)), as dr/dx = −x·r³/width; dgain = Σ x·r·dy. With the mean μ of a layer
 * norm, x − μ stands for x, dμ/dx = 1/width makes dx less by r·mean(gain·dy), and dbias = Σ dy.
 */
function normalizeGrad(
  { x, gain, dy, dx, dgain, dbias }: Arrays<"x" | "gain" | "dy" | "dx" | "dgain"> & Biased<"dbias">,
  { width, eps, offset = 0 }: Rows,
): void {
  const sum = new Float64Array(width);
  const shift = new Float64Array(width);
  for (let o = 0; o < x.length; o += width) {
    const { scale, mean } = moments(x, o, width, eps, dbias !== undefined);
    let dot = 0;
    let total = 0;
    for (let c = 0; c < width; c++) {
      const slope = (offset + gain[c]!) * dy[o + c]!;
      dot += (x[o + c]! - mean) * slope;
      total += slope;
    }
    const pull = (dot * scale * scale) / width;
    const pulls = dbias === undefined ? 0 : total / width;
    for (let c = 0; c < width; c++) {
      dx[o + c] = scale * ((offset + gain[c]!) * dy[o + c]! - (x[o + c]! - mean) * pull - pulls);
      sum[c]! += (x[o + c]! - mean) * scale * dy[o + c]!;
      shift[c]! += dy[o + c]!;
    }
  }
  for (let c = 0; c < width; c++) dgain[c]! += sum[c]!;
  if (dbias) for (let c = 0; c < width; c++) dbias[c]! += shift[c]!;
}

/** Returns the mean of a row, 0 unless it is to be subtracted, and 1 / sqrt(mean((x − mean)²) + eps). */
function moments(x: Float32Array, at: number, width: number, eps: number, center: boolean): { scale: number; mean: number } {
  let mean = 0;
  if (center) for (let c = 0; c < width; c++) mean += x[at + c]! / width;
  let squares = 0;
  for (let c = 0; c < width; c++) squares += (x[at + c]! - mean) ** 2;
  return { scale: 1 / Math.sqrt(squares / width + eps), mean };
}
