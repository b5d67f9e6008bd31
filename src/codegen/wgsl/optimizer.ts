/** Kernels of the optimizer step: sum of squares, clipping and updates. */
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { map } from "./elementwise.ts";
import { scalarSum } from "./reduce.ts";
import { float, horizontal, scalar, vector, widthOf } from "./text.ts";

function sumSquares(spec: KernelSpec): GeneratedKernel {
  const width = widthOf(spec.size.g!);
  return scalarSum(spec, {
    buffers: [{ arg: "g", type: vector(scalar(spec.dtype.g!), width) }],
    count: spec.size.g! / width,
    lines: [`let v = ${vector("f32", width)}(g[i]);`, "let square = v * v;"],
    term: horizontal("square", width),
    factor: float(spec.d.scale!),
  });
}

const clipped = (norm: string, max: number): string => (max > 0 ? `min(1.0, ${float(max)} / (${norm} + 1e-6))` : "1.0");

/** WGSL compilers may assume finite floats, so non-finite values are detected by their bits; they are copied unchanged. */
const isNonfinite = (x: string): string => `(bitcast<u32>(${x}) & 0x7f800000u) == 0x7f800000u`;

function markNonfinite(spec: KernelSpec): GeneratedKernel {
  return map(spec, { width: 1, reads: ["x", "y"], results: { y: `select(y, x, ${isNonfinite("x")})` } });
}

/** `by` is an expression for the loss scale of the gradients. */
function clip(spec: KernelSpec, by?: string): GeneratedKernel {
  const divided = (value: string): string => (by ? `${value} / ${by}` : value);
  return map(spec, {
    width: 1,
    lines: [`let skipped = ${isNonfinite("sq")};`, `let all = ${divided("sqrt(sq)")};`],
    results: { norm: "select(all, sq, skipped)", scale: `select(${divided(clipped("all", spec.d.max!))}, 0.0, skipped)` },
  });
}

/**
 * 1 − e^z for z ≤ 0. beta^step = e^(step·ln beta), and the difference 1 − beta^step loses digits near 0, where the series of expm1 is
 * used; the relative size of its first omitted term is z^8/9!, about 1e-8.
 */
const lacks = [
  "fn lacks(z: f32) -> f32 {",
  "  if (z < -0.5) {",
  "    return 1.0 - exp(z);",
  "  }",
  `  return ${[8, 7, 6, 5, 4, 3, 2].reduce((inner, n) => `(1.0 + z / ${float(n)} * ${inner})`, "1.0")} * -z;`,
  "}",
].join("\n");

/** An op's moves: the outputs' formulas, with `decay` an expression of the attribute or the operand. */
interface Method {
  readonly scalars: readonly string[];
  readonly functions?: readonly string[];
  readonly lines: readonly string[];
  readonly results: Readonly<Record<string, string>>;
}
type Sizes = KernelSpec["d"];

function adaptive({ beta1, beta2, eps }: Sizes, decay: string, decoupled: boolean): Method {
  return {
    scalars: ["scale", "lr", "step"],
    functions: [lacks],
    lines: [
      `let rate = lr / lacks(step * ${float(Math.log(beta1!))});`,
      `let unbias = sqrt(lacks(step * ${float(Math.log(beta2!))}));`,
      `let x = g * scale${decoupled ? "" : ` + ${decay} * w`};`,
      `let mean = ${float(beta1!)} * m + ${float(1 - beta1!)} * x;`,
      `let square = ${float(beta2!)} * v + ${float(1 - beta2!)} * x * x;`,
    ],
    results: {
      w: `w${decoupled ? ` * (1.0 - lr * ${decay})` : ""} - rate * mean / (sqrt(square) / unbias + ${float(eps!)})`,
      m: "mean",
      v: "square",
    },
  };
}
const methods: Readonly<Record<string, (d: Sizes, decay: string) => Method>> = {
  adamw: (d, decay) => adaptive(d, decay, true),
  adam: (d, decay) => adaptive(d, decay, false),
  sgd: (_, decay) => ({ scalars: ["scale", "lr"], lines: [], results: { w: `w - lr * (g * scale + ${decay} * w)` } }),
  sgd_momentum: ({ momentum }, decay) => ({
    scalars: ["scale", "lr"],
    lines: [`let speed = ${float(momentum!)} * m + (g * scale + ${decay} * w);`],
    results: { w: "w - lr * speed", m: "speed" },
  }),
};

function moves(spec: KernelSpec, { scalars, functions = [], lines, results }: Method): GeneratedKernel {
  return map(spec, {
    width: widthOf(spec.size.g!),
    reads: ["g", ...scalars, ...Object.keys(results)],
    // an operand of one element is no scalar for that
    at: Object.fromEntries(scalars.map((name) => [name, spec.size.g!])),
    functions,
    // a scale of 0 skips the step: outputs keep their values for any gradients
    lines: [...lines, "let stays = scale == 0.0;"],
    results: Object.fromEntries(Object.entries(results).map(([name, value]) => [name, `select(${value}, ${name}, stays)`])),
  });
}

export const optimizer = {
  sum_squares: sumSquares,
  mark_nonfinite: markNonfinite,
  clip: (spec: KernelSpec): GeneratedKernel => clip(spec),
  clip_scaled: (spec: KernelSpec): GeneratedKernel => clip(spec, "by"),
  ...Object.fromEntries(
    Object.entries(methods).flatMap(([name, of]): [string, (spec: KernelSpec) => GeneratedKernel][] => [
      [name, (spec) => moves(spec, of(spec.d, float(spec.d.decay!)))],
      [
        `${name}_scheduled`,
        (spec) => {
          const method = of(spec.d, "decay");
          return moves(spec, { ...method, scalars: [...method.scalars, "decay"] });
        },
      ],
    ]),
  ),
};
