/** The frame of every CUDA source: the prelude and a namespace per kernel. */
import type { Dtype } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import type { KernelSpec } from "../kernelSpec.ts";

/** The 16-bit float types: names in CUDA, packed pairs, and matrix instructions. */
export const float16Types = {
  bf16: { half: "bf16", suffix: "", mma: "mmaBf16" },
  f16: { half: "f16", suffix: "F16", mma: "mmaF16" },
} as const;
export type Float16 = keyof typeof float16Types;
export const isFloat16 = (t: Dtype): t is Float16 => t === "bf16" || t === "f16";

/**
 * Returns a complete source. Entry points of the body are `extern "C" __global__` and keep their names; all other declarations are in
 * `namespace <name>_ns`. Sources can be concatenated: the prelude has an include guard.
 */
export function source({ name, dtype }: Pick<KernelSpec, "name" | "dtype">, body: string): string {
  const more = Object.values(dtype).includes("f16") ? `${render("cuda/f16.cuh", {})}\n` : "";
  return `${render("cuda/prelude.cuh", { guard: "RANKC_PRELUDE" })}\n${more}namespace ${name}_ns {\n\n${body}\n}  // namespace ${name}_ns\n`;
}
