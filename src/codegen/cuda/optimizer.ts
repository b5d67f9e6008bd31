/** Kernels of the optimizer step: clipping and updates. */

import type { CudaGenerator, KernelSpec } from "../kernelSpec.ts";
import type { Arch } from "../targetNames.ts";
import { type CudaFormula, f32, makeElementwise } from "./elementwise.ts";

type Sizes = Readonly<Record<string, number>>;

const clipped = (norm: string, { max }: Sizes): string => (max! > 0 ? `fminf(1.0f, ${f32(max!)} / (${norm} + 1e-6f))` : "1.0f");

/** Tests the bits, because compilers may assume finite floats. */
const isFiniteText = (x: string): string => `(__float_as_uint(${x}) & 0x7f800000u) != 0x7f800000u`;

/** `decay` is an expression: of the attribute, or of the operand. */
function adaptive({ beta1, beta2, eps }: Sizes, decay: string, decoupled: boolean): CudaFormula {
  return unlessSkipped({
    ...{ streams: ["g", "w", "m", "v"], scalars: ["scale", "lr", "step"] },
    // 1 − βᵗ by expm1: for β near 1 the difference loses digits
    once: [
      `const float rate = lr / -expm1f(step * ${f32(Math.log(beta1!))});`,
      `const float unbias = 1.0f / sqrtf(-expm1f(step * ${f32(Math.log(beta2!))}));`,
      ...(decoupled ? [`const float keep = 1.0f - lr * ${decay};`] : []),
    ],
    element: [
      `const float x = g * scale${decoupled ? "" : ` + ${decay} * w`};`,
      `const float mean = ${f32(beta1!)} * m + ${f32(1 - beta1!)} * x;`,
      `const float square = ${f32(beta2!)} * v + ${f32(1 - beta2!)} * x * x;`,
    ],
    outputs: {
      w: `w${decoupled ? " * keep" : ""} - rate * mean * fastReciprocal(sqrtf(square) * unbias + ${f32(eps!)})`,
      m: "mean",
      v: "square",
    },
  });
}

const plain = (_: Sizes, decay: string): CudaFormula =>
  unlessSkipped({
    ...{ streams: ["g", "w"], scalars: ["scale", "lr"] },
    outputs: { w: `w - lr * (g * scale + ${decay} * w)` },
  });

const withMomentum = ({ momentum }: Sizes, decay: string): CudaFormula =>
  unlessSkipped({
    ...{ streams: ["g", "w", "m"], scalars: ["scale", "lr"] },
    element: [`const float speed = ${f32(momentum!)} * m + (g * scale + ${decay} * w);`],
    outputs: { w: "w - lr * speed", m: "speed" },
  });

/** A scale of 0 skips the step: outputs keep their values for any gradients. */
function unlessSkipped({ outputs, once = [], ...formula }: CudaFormula): CudaFormula {
  return {
    ...formula,
    once: [...once, "const bool stays = scale == 0.0f;"],
    outputs: Object.fromEntries(Object.entries(outputs).map(([name, value]) => [name, `stays ? ${name} : ${value}`])),
  };
}

const methods: Readonly<Record<string, (d: Sizes, decay: string) => CudaFormula>> = {
  adamw: (d, decay) => adaptive(d, decay, true),
  adam: (d, decay) => adaptive(d, decay, false),
  sgd: plain,
  sgd_momentum: withMomentum,
};
const runtimeAttrs = (f: CudaFormula): CudaFormula => ({ ...f, scalars: [...f.scalars!, "decay"] });

const formulas: Readonly<Record<string, (d: Sizes) => CudaFormula>> = {
  mark_nonfinite: () => ({ streams: ["x", "y"], outputs: { y: `${isFiniteText("x")} ? y : x` } }),
  clip: (d) => ({ streams: ["sq"], outputs: { scale: `${isFiniteText("sq")} ? ${clipped("sqrtf(sq)", d)} : 0.0f`, norm: "sqrtf(sq)" } }),
  clip_scaled: (d) => ({
    ...{ streams: ["sq"], scalars: ["by"] },
    element: ["const float norm = sqrtf(sq) / by;"],
    outputs: { scale: `${isFiniteText("sq")} ? ${clipped("norm", d)} / by : 0.0f`, norm: "norm" },
  }),
  ...Object.fromEntries(
    Object.entries(methods).flatMap(([name, of]): [string, (d: Sizes) => CudaFormula][] => [
      [name, (d) => of(d, f32(d.decay!))],
      [`${name}_scheduled`, (d) => runtimeAttrs(of(d, "decay"))],
    ]),
  ),
};

export const optimizer: Readonly<Record<string, CudaGenerator>> = Object.fromEntries(
  Object.entries(formulas).map(([op, formula]) => [op, (spec: KernelSpec, arch: Arch) => makeElementwise(spec, arch, formula(spec.d))]),
);
