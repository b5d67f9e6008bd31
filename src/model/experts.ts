/**
 * The mixture of experts of one layer: router → permute → grouped GEMMs → unpermute, plus the shared experts. Dispatch and combine are
 * collectives that `shard` inserts, and so are the regrids where the grid of the experts does not nest with that of the tokens.
 */
import { isGated } from "../../schemas/activations.ts";
import { type ExpertNodes, nodesOfDispatch, ranksOfToken, sendsTokensOnce } from "../../schemas/experts.ts";
import { groupMask, markWeights, packGroups, packRowGroups, packRows, permuteRows, rowChoices, unpermuteRows } from "../ops/dispatch.ts";
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
  if (sendsTokensOnce(moe) && module.job.parallel.expert > 1) return dispatchedOnce(module, x, moe, routing);
  const at = (name: string) => module.at(`moe.${name}`);
  const { map: c, weights: p, rows: limits } = routing;
  // dispatch `all_gather`: tokens are gathered over ep, and each rank permutes those of its experts
  const pin = (v: Value) => (moe.dispatch === "all_gather" ? declared(v, { pins: [{ dim: "E", axis: "ep", path: PATH }] }) : v);
  return {
    rows: pin(permute.of({ x, c }, limits, at("permute"))),
    weights: pin(pack.of({ p, c }, limits, at("pack"))),
    combined: (r) => pin(unpermute.of({ r, c }, limits, at("unpermute"))),
  };
}

const PATH = "model.moe.dispatch";
/** Pins the op of a value to the ranks of experts. Expert tensor ranks have the same rows, since each has a part of every expert. */
const onExperts = (v: Value, across?: "nodes"): Value =>
  declared(v, {
    pins: [
      { dim: "E", axis: "ep", ...(across && { across }), path: PATH },
      { axis: "etp", path: PATH },
    ],
  });
/** Pins the op of a value to the nodes of experts, and not to the ranks of each. */
const onNodes = (v: Value): Value => onExperts(v, "nodes");
/** Pins the op of a value to the ranks of its tokens, whose rows go to nodes: a rank of a node finds the tokens of its places by where they came from. */
const onTokens = (v: Value): Value =>
  declared(v, {
    pins: [
      { dim: "B", axis: "dp", path: PATH },
      { dim: "S", axis: "cp", path: PATH },
      { dim: "S", axis: "tp", path: PATH },
    ],
  });

/** Rows of a list of tokens with the weights of their experts, and the way back from the sums of these rows to tokens. */
interface Listed {
  readonly list: Value;
  readonly marked: Value;
  readonly summed: (sums: Value) => Value;
}

/**
 * The same for dispatch `once`: the experts of a rank are a group, a token has one row for each group that has experts of it, and such rows
 * are exchanged. With `once_per_node` the experts of a node are a group first, and its ranks are groups of the rows that the node receives.
 */
function dispatchedOnce(module: ModuleBuilder, x: Value, moe: Moe, routing: Routing): Dispatched {
  const at = (name: string) => module.at(`moe.${name}`);
  const ranks = module.job.parallel.expert;
  const ofExperts = { ...routing.rows, K: moe.experts / ranks };
  const nodes = nodesOfDispatch(module.job);
  const perNode = nodes && listOf(module, x, moe, routing, nodes.nodes);
  const { list, marked, summed } =
    nodes && perNode ? listInNode(module, moe, routing, perNode, nodes) : listOf(module, x, moe, routing, ranks);
  const choices = onExperts(rowChoices.of({ v: marked }, { K: 1 }, at("row_choices")));
  return {
    rows: onExperts(permuteRows.of({ x: list, c: choices }, ofExperts, at("permute_rows"))),
    weights: onExperts(packRows.of({ p: marked, c: choices }, ofExperts, at("pack"))),
    combined: (r) => summed(onExperts(unpermuteRows.of({ r, c: choices }, ofExperts, at("unpermute_rows")))),
  };
}

/** Builds the rows of tokens for groups of experts. */
function listOf(module: ModuleBuilder, x: Value, moe: Moe, { map: c, weights: p, rows: limits }: Routing, groups: number): Listed {
  const at = (name: string) => module.at(`moe.${name}`);
  const K = moe.experts / groups;
  const ofGroups = groupLimits(moe, limits, groups);
  const pin = nodesOfDispatch(module.job) ? onTokens : (v: Value): Value => v;
  const g = groupMask.of({ c }, { K }, at("group_mask"));
  const weights = markWeights.of({ p, c }, {}, at("marked_weights"));
  return {
    list: pin(permute.of({ x, c: g }, ofGroups, at("permute"))),
    marked: pin(packGroups.of({ p: weights, c: g }, { ...ofGroups, K }, at("pack_groups"))),
    summed: (r) => pin(unpermute.of({ r, c: g }, ofGroups, at("unpermute"))),
  };
}

/** Builds the rows that a node sends to its ranks, from those that it receives. */
function listInNode(module: ModuleBuilder, moe: Moe, { rows: limits }: Routing, { list, marked, summed }: Listed, n: ExpertNodes): Listed {
  const at = (name: string) => module.at(`moe.${name}`);
  const ranks = n.nodes * n.perNode;
  const ofRanks = { ...groupLimits(moe, limits, ranks), K: n.perNode };
  const W = moe.experts / ranks;
  const c = onNodes(rowChoices.of({ v: marked }, { K: W }, at("rank_choices")));
  return {
    list: onNodes(permuteRows.of({ x: list, c }, ofRanks, at("permute_ranks"))),
    marked: onNodes(packRowGroups.of({ p: marked, c }, { ...ofRanks, W }, at("pack_ranks"))),
    summed: (r) => summed(onNodes(unpermuteRows.of({ r, c }, ofRanks, at("unpermute_ranks")))),
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
