/** The dense feed-forward block, with or without a gate, sharded along its inner width: of a layer, or the shared experts. */

import { isGated } from "../../schemas/activations.ts";
import type { Job } from "../../schemas/job.ts";
import { gatedUnits } from "../ops/gatedUnits.ts";
import { addBias, gemm } from "../ops/gemm.ts";
import type { Value } from "../ops/op.ts";
import { ungatedUnits } from "../ops/ungatedUnits.ts";
import { inStream, type ModuleBuilder } from "./builder.ts";

/** Applies an activation to [B,S,F]. `into(name)` returns the product with the matrix w1, and with a gate also that with w3. */
function activated(activation: Job["model"]["activation"], into: (name: "1" | "3") => Value, id: string): Value {
  if (isGated(activation)) return gatedUnits[activation].dense.of({ gate: into("1"), up: into("3") }, {}, id);
  return ungatedUnits[activation].dense.of({ x: into("1") }, {}, id);
}

/**
 * Builds the block: `h` [B,S,D] → [B,S,D] with inner width `width`. Its weights are named `<weights>w1`, w3 (with a gate) and w2, its biases
 * b1, b3 and b2.
 */
export function dense(module: ModuleBuilder, h: Value, width: "H" | "X", weights = "", nodes = "mlp"): Value {
  const { at, weight, bias, job } = module;
  const { activation, mlp_bias } = job.model;
  const hasBiases = mlp_bias && width === "H";
  const product = (name: string, dims: string, x: Value): Value =>
    gemm.of({ x, w: weight(`${weights}w${name}`, dims) }, {}, at(`${nodes}.w${name}`));
  const biased = (name: string, dim: string, x: Value): Value =>
    hasBiases ? addBias.of({ x, bias: bias(`${weights}b${name}`, dim) }, {}, at(`${nodes}.w${name}_bias`)) : x;
  const into = (name: "1" | "3"): Value => biased(name, `${width}@tp`, product(name, `D,${width}@tp`, h));
  const out = product("2", `${width}@tp,D`, activated(activation, into, at(`${nodes}.${activation}`)));
  // the bias is added after the reduction over tensor ranks, in the layout of the residual stream
  return hasBiases ? biased("2", "D", inStream(job, out)) : out;
}
