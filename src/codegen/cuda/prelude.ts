/** The frame of every CUDA source: the prelude and a namespace per kernel. */
import { dtypes } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import type { KernelSpec } from "../kernelSpec.ts";

export { type Float16, float16Types, isFloat16 } from "../../../schemas/dtypes.ts";

/**
 * Returns a complete source. Entry points of the body are `extern "C" __global__` and keep their names; all other declarations are in
 * `namespace <name>_ns`. Sources can be concatenated: the prelude has an include guard.
 */
export function source({ name, dtype }: Pick<KernelSpec, "name" | "dtype">, body: string): string {
  const helpers = new Set(Object.values(dtype).flatMap((type) => dtypes[type].cuda?.helpers ?? []));
  const more = [...helpers].map((file) => `${render(file, {})}\n`).join("");
  return `${render("cuda/prelude.cuh", { guard: "RANKC_PRELUDE" })}\n${more}namespace ${name}_ns {\n\n${body}\n}  // namespace ${name}_ns\n`;
}
