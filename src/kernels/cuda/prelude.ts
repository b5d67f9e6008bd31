/** What stands around the body of every CUDA source: the prelude before it, and a namespace of its own. */
import { render } from "../../../templates/bindings.ts";
import type { Use } from "../kernel.ts";

/**
 * A whole source. The body says `extern "C" __global__` before its entries (they keep their names); everything else in it is
 * closed in `namespace <name>_ns`. Sources may be put one after the other: the prelude counts once.
 */
export const source = (use: Pick<Use, "name">, body: string): string =>
  `${render("cuda/prelude.cuh", { guard: "RANKC_PRELUDE" })}\nnamespace ${use.name}_ns {\n\n${body}\n}  // namespace ${use.name}_ns\n`;
