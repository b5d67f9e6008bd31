/**
 * The mixture of experts of one layer: router → permute → grouped GEMMs → unpermute, plus the shared experts. Dispatch and combine are
 * collectives that `shard` inserts, and so are the regrids where the grid of the experts does not nest with that of the tokens.
 */
import { isGated } from "../../schemas/job.ts";
import { gatedUnits } from "../ops/gatedUnits.ts";
import { add, addBiasRows, cast, gemm, groupedGemm } from "../ops/gemm.ts";
import { pack, permute, sigmoidGate, unpermute } from "../ops/moe.ts";
import { declared, type Value } from "../ops/op.ts";
import { combineWeights } from "../ops/router.ts";
import { ungatedUnits } from "../ops/ungatedUnits.ts";
import type { ModuleBuilder } from "./builder.ts";
import { dense } from "./feedForward.ts";
import { logitsOf, type Moe, type Routing, route } from "./router.ts";

/** Builds the experts of a layer: the normalised stream `h` [B,S,D] → the addend of the residual stream [B,S,D]. */
export function experts(module: ModuleBuilder, h: Value, moe: Moe): Value {
  const { weight } = module;
  const at = (name: string) => module.at(`moe.${name}`);
  const routing = route(module, moe, logitsOf(module, h, moe));
  if (moe.latent === null) return withShared(module, h, moe, routed(module, h, moe, routing, "D"));
  const down = gemm.of({ x: h, w: weight("latent.down", "D,L") }, {}, at("latent_down"));
  const up = gemm.of({ x: routed(module, down, moe, routing, "L"), w: weight("latent.up", "L,D") }, {}, at("latent_up"));
  return withShared(module, h, moe, up);
}

/** Applies the routed experts to tokens [B,S,width]. */
function routed(module: ModuleBuilder, x: Value, moe: Moe, { map: c, weights: p, rows: limits }: Routing, width: "D" | "L"): Value {
  const at = (name: string) => module.at(`moe.${name}`);
  // dispatch `all_gather`: tokens are gathered over ep, and each rank permutes those of its experts
  const pin = (v: Value) =>
    moe.dispatch === "all_gather" ? declared(v, { pin: { dim: "E", axis: "ep", path: "model.moe.dispatch" } }) : v;
  const rows = pin(permute.of({ x, c }, limits, at("permute")));
  const w = (name: string, dims: string, r: Value) => groupedGemm.of({ x: r, w: module.weight(name, dims) }, {}, at(name));
  // the combine weight is sent with the row and applied inside the activation, as in Megatron Core
  const weights = pin(pack.of({ p, c }, limits, at("pack")));
  const into = (name: "1" | "3"): Value => {
    const product = w(`w${name}`, `E@ep,${width},F@etp`, rows);
    return moe.bias ? addBiasRows.of({ x: product, bias: module.bias(`b${name}`, "E@ep,F@etp") }, {}, at(`w${name}_bias`)) : product;
  };
  const { activation } = module.job.model;
  const act = isGated(activation)
    ? gatedUnits[activation].rows.of({ gate: into("1"), up: into("3"), p: weights }, {}, at(activation))
    : ungatedUnits[activation].rows.of({ x: into("1"), p: weights }, {}, at(activation));
  const y = pin(unpermute.of({ r: w("w2", `E@ep,F@etp,${width}`, act), c }, limits, at("unpermute")));
  return moe.bias ? add.of({ a: y, b: weightedBiases(module, x, { map: c, weights: p }, width) }, {}, at("w2_bias_sum")) : y;
}

/**
 * The output biases of a token's experts, Σ_e p_e·b_e, as in Megatron Core. They are added to tokens, not to rows: then each is added once,
 * however the experts' inner width is sharded, and the product is small. All ranks have all of them.
 */
function weightedBiases(
  module: ModuleBuilder,
  x: Value,
  { map: c, weights: p }: Pick<Routing, "map" | "weights">,
  width: "D" | "L",
): Value {
  const at = (name: string) => module.at(`moe.${name}`);
  // a capacity may have dropped rows of the weights
  const kept = combineWeights.of({ p, c }, { normalize: 0, scale: 1 }, at("kept_weights"));
  const shares = x.dtype === "f32" ? kept : declared(cast.of({ x: kept }, {}, at("bias_weights")), { dtype: x.dtype });
  return gemm.of({ x: shares, w: module.bias("b2", `E,${width}`) }, {}, at("w2_bias"));
}

/** Adds the shared experts of `h` to `y`, if the model has them. */
function withShared(module: ModuleBuilder, h: Value, { shared }: Moe, y: Value): Value {
  if (shared === null) return y;
  const at = (name: string) => module.at(`moe.shared.${name}`);
  const all = dense(module, h, "X", "shared.", "moe.shared");
  const gatedSum = () => {
    const gate = gemm.of({ x: h, w: module.weight("shared.gate", "D,1") }, {}, at("gate"));
    return sigmoidGate.of({ x: all, gate }, { C: module.job.model.hidden }, at("sigmoid_gate"));
  };
  return add.of({ a: y, b: shared.gate ? gatedSum() : all }, {}, at("sum"));
}
