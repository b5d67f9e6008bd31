/**
 * The mixture of experts of one layer: router → permute → grouped GEMMs → unpermute, plus the shared experts. Dispatch and combine are
 * collectives that `shard` inserts, and so are the regrids where the grid of the experts does not nest with that of the tokens.
 */
import { ranksOfToken } from "../../schemas/experts.ts";
import { isGated } from "../../schemas/job.ts";
import { groupMask, markWeights, packGroups, packRows, permuteRows, rowChoices, unpermuteRows } from "../ops/dispatch.ts";
import { gatedUnits } from "../ops/gatedUnits.ts";
import { add, addBiasRows, cast, gemm, groupedGemm } from "../ops/gemm.ts";
import { pack, permute, sigmoidGate, unpermute } from "../ops/moe.ts";
import { type Attrs, declared, type Value } from "../ops/op.ts";
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
  const { rows, weights, combined } = dispatched(module, x, moe, { map: c, weights: p, rows: limits });
  const w = (name: string, dims: string, r: Value) => groupedGemm.of({ x: r, w: module.weight(name, dims) }, {}, at(name));
  const into = (name: "1" | "3"): Value => {
    const product = w(`w${name}`, `E@ep,${width},F@etp`, rows);
    return moe.bias ? addBiasRows.of({ x: product, bias: module.bias(`b${name}`, "E@ep,F@etp") }, {}, at(`w${name}_bias`)) : product;
  };
  const { activation } = module.job.model;
  const act = isGated(activation)
    ? gatedUnits[activation].rows.of({ gate: into("1"), up: into("3"), p: weights }, {}, at(activation))
    : ungatedUnits[activation].rows.of({ x: into("1"), p: weights }, {}, at(activation));
  const y = combined(w("w2", `E@ep,F@etp,${width}`, act));
  return moe.bias ? add.of({ a: y, b: weightedBiases(module, x, { map: c, weights: p }, width) }, {}, at("w2_bias_sum")) : y;
}

/** The rows of experts and their weights, which are applied inside the activation as in Megatron Core, and the way back to tokens. */
interface Dispatched {
  readonly rows: Value;
  readonly weights: Value;
  readonly combined: (r: Value) => Value;
}
/** Builds the rows of tokens [B,S,width] and of their weights. */
function dispatched(module: ModuleBuilder, x: Value, moe: Moe, routing: Routing): Dispatched {
  if (moe.dispatch === "once" && module.job.parallel.expert > 1) return dispatchedOnce(module, x, moe, routing);
  const at = (name: string) => module.at(`moe.${name}`);
  const { map: c, weights: p, rows: limits } = routing;
  // dispatch `all_gather`: tokens are gathered over ep, and each rank permutes those of its experts
  const pin = (v: Value) =>
    moe.dispatch === "all_gather" ? declared(v, { pins: [{ dim: "E", axis: "ep", path: "model.moe.dispatch" }] }) : v;
  return {
    rows: pin(permute.of({ x, c }, limits, at("permute"))),
    weights: pin(pack.of({ p, c }, limits, at("pack"))),
    combined: (r) => pin(unpermute.of({ r, c }, limits, at("unpermute"))),
  };
}

/**
 * The same for dispatch `once`: the experts of a rank are a group, a token has one row for each group that has experts of it, and such rows
 * are exchanged. Expert tensor ranks have the same list of rows, since each has a part of every expert.
 */
function dispatchedOnce(module: ModuleBuilder, x: Value, moe: Moe, { map: c, weights: p, rows: limits }: Routing): Dispatched {
  const at = (name: string) => module.at(`moe.${name}`);
  const G = module.job.parallel.expert;
  const K = moe.experts / G;
  const path = "model.moe.dispatch";
  const onExperts = (v: Value) =>
    declared(v, {
      pins: [
        { dim: "E", axis: "ep", path },
        { axis: "etp", path },
      ],
    });
  const ofGroups = groupLimits(moe, limits, G);
  const ofExperts = { ...limits, K };
  const g = groupMask.of({ c }, { K }, at("group_mask"));
  const marked = packGroups.of({ p: markWeights.of({ p, c }, {}, at("marked_weights")), c: g }, { ...ofGroups, K }, at("pack_groups"));
  const list = permute.of({ x, c: g }, ofGroups, at("permute"));
  const choices = onExperts(rowChoices.of({ v: marked }, {}, at("row_choices")));
  return {
    rows: onExperts(permuteRows.of({ x: list, c: choices }, ofExperts, at("permute_rows"))),
    weights: onExperts(packRows.of({ p: marked, c: choices }, ofExperts, at("pack"))),
    combined(r) {
      const sums = onExperts(unpermuteRows.of({ r, c: choices }, ofExperts, at("unpermute_rows")));
      return unpermute.of({ r: sums, c: g }, ofGroups, at("unpermute"));
    },
  };
}

/** Returns the limits on rows per group of experts, from those per expert. A capacity bounds the experts of a token on average. */
function groupLimits(moe: Moe, { k = 0, quota, sequences, positions }: Attrs, groups: number): Attrs {
  const K = moe.experts / groups;
  if (quota === undefined || sequences === undefined || positions === undefined) {
    const { most, mean } = ranksOfToken(moe, groups, k);
    return { k: most, mean };
  }
  const { most } = ranksOfToken(moe, groups, k);
  const { mean } = ranksOfToken(moe, groups, Math.min(k, (quota * moe.experts) / (sequences * positions)));
  return { k: most, mean, quota: quota * K, sequences, positions };
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
