/** A dense feed-forward part, cut along its inner width: of a layer, or of the experts that all its tokens share. */

import { gatedUnits } from "../ops/gatedUnits.ts";
import { gemm } from "../ops/linear.ts";
import type { Value } from "../ops/op.ts";
import type { ModuleBuilder } from "./builder.ts";

/** `h` [B,S,D] → [B,S,D] by way of `width`; its weights are called `<weights>w1`, w3 and w2. */
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
