/** The step: the sum of squares of a gradient, what clipping leaves, and AdamW. */
import type { Made, Use } from "../kernel.ts";
import { map } from "./elementwise.ts";
import { scalarSum } from "./reduce.ts";
import { float, horizontal, scalar, vector, widthOf } from "./text.ts";

function sumSquares(use: Use): Made {
  const width = widthOf(use.size.g!);
  return scalarSum(use, {
    buffers: [{ arg: "g", type: vector(scalar(use.dtype.g!), width) }],
    count: use.size.g! / width,
    lines: [`let v = ${vector("f32", width)}(g[i]);`, "let square = v * v;"],
    term: horizontal("square", width),
    factor: float(use.d.scale!),
  });
}

function clip(use: Use): Made {
  const max = use.d.max!;
  const left = max > 0 ? `min(1.0, ${float(max)} / (sqrt(sq) + 1e-6))` : "1.0";
  return map(use, { width: 1, results: { norm: "sqrt(sq)", scale: left } });
}

/**
 * 1 − e^z for z ≤ 0. beta^step = e^(step·ln beta), and 1 − beta^step near 0 would lose the digits it is divided by: there
 * the series of expm1, whose first term left out is z^8/9! ≈ 1e-8 of it.
 */
const lacks = [
  "fn lacks(z: f32) -> f32 {",
  "  if (z < -0.5) {",
  "    return 1.0 - exp(z);",
  "  }",
  `  return ${[8, 7, 6, 5, 4, 3, 2].reduce((inner, n) => `(1.0 + z / ${float(n)} * ${inner})`, "1.0")} * -z;`,
  "}",
].join("\n");

function adamw(use: Use): Made {
  const { beta1, beta2, eps, decay } = use.d as Readonly<Record<"beta1" | "beta2" | "eps" | "decay", number>>;
  return map(use, {
    width: widthOf(use.size.g!),
    reads: ["g", "scale", "lr", "step", "w", "m", "v"],
    // an operand of one element is no scalar for that
    at: Object.fromEntries(["scale", "lr", "step"].map((name) => [name, use.size.g!])),
    functions: [lacks],
    lines: [
      `let rate = lr / lacks(step * ${float(Math.log(beta1))});`,
      `let unbias = sqrt(lacks(step * ${float(Math.log(beta2))}));`,
      "let x = g * scale;",
      `let mean = ${float(beta1)} * m + ${float(1 - beta1)} * x;`,
      `let square = ${float(beta2)} * v + ${float(1 - beta2)} * x * x;`,
    ],
    results: {
      w: `w * (1.0 - lr * ${float(decay)}) - rate * mean / (sqrt(square) / unbias + ${float(eps)})`,
      m: "mean",
      v: "square",
    },
  });
}

export const optimizer = { sum_squares: sumSquares, clip, adamw };
