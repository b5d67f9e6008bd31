/** The dense gated feed-forward block, sharded along its inner width: of a layer, or the shared experts. */

import { gatedUnits } from "../ops/gatedUnits.ts";
import { gemm } from "../ops/linear.ts";
import type { Value } from "../ops/op.ts";
import type { ModuleBuilder } from "./builder.ts";

/** Builds the block: `h` [B,S,D] → [B,S,D] with inner width `width`. Its weights are named `<weights>w1`, w3 and w2. */
export function dense({ at, weight, job }: ModuleBuilder, h: Value, width: "H" | "X", weights = "", nodes = "mlp"): Value {
  const w = (name: string, dims: string, x: Value): Value =>
    gemm.of({ x, w: weight(`${weights}${name}`, dims) }, {}, at(`${nodes}.${name}`));
  const { dense: activation } = gatedUnits[job.model.activation];
  const act = activation.of(
    { gate: w("w1", `D,${width}@tp`, h), up: w("w3", `D,${width}@tp`, h) },
    {},
    at(`${nodes}.${job.model.activation}`),
  );
  return w("w2", `${width}@tp,D`, act);
}
