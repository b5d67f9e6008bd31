/** What stands around the body of every CUDA source: the prelude before it, and a namespace of its own. */
import type { Dtype } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import type { KernelSpec } from "../kernelSpec.ts";

/** The 16-bit floats of a job, as sources name them and what belongs to each: its pairs in a word, its products. */
export const float16Types = {
  bf16: { half: "bf16", suffix: "", mma: "mmaBf16" },
  f16: { half: "f16", suffix: "F16", mma: "mmaF16" },
} as const;
export type Float16 = keyof typeof float16Types;
export const isFloat16 = (t: Dtype): t is Float16 => t === "bf16" || t === "f16";

/**
 * A whole source. The body says `extern "C" __global__` before its entries (they keep their names); everything else in it is
 * closed in `namespace <name>_ns`. Sources may be put one after the other: the prelude counts once.
 */
export function source({ name, dtype }: Pick<KernelSpec, "name" | "dtype">, body: string): string {
  const more = Object.values(dtype).includes("f16") ? `${render("cuda/f16.cuh", {})}\n` : "";
  return `${render("cuda/prelude.cuh", { guard: "RANKC_PRELUDE" })}\n${more}namespace ${name}_ns {\n\n${body}\n}  // namespace ${name}_ns\n`;
}
