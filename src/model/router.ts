/** The router of one layer: logits → top-k mask and combine weights. Also the balancing losses and the routing counts. */
import { balancesOf, evenBy, expertLayersOf } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { hasTokenWeights } from "../../schemas/lossWeights.ts";
import {
  auxLoss,
  biasUpdate,
  expertCounts,
  expertLoad,
  expertLoads,
  globalAuxLoss,
  quantile,
  quantileUpdate,
  runningMean,
  sinkhorn,
} from "../ops/balance.ts";
import { drop, droppedRows, expertChoiceMask, uniformMask } from "../ops/capacity.ts";
import { jitter } from "../ops/dropout.ts";
import { addBias, gemm } from "../ops/gemm.ts";
import { type Attrs, declared, type Value } from "../ops/op.ts";
import {
  combineWeights,
  normalize,
  routerEntropy,
  sigmoid,
  softmax,
  sqrtSoftplus,
  topKMask,
  topKMaskBiased,
  zLoss,
} from "../ops/router.ts";
import { type ModuleBuilder, orderOf } from "./builder.ts";

/** The `model.moe` section of a job. */
export type Moe = NonNullable<Job["model"]["moe"]>;
/** The result of routing. */
export interface Routing {
  /** c[B,S,E]: 1 where a token is routed to an expert, else 0. */
  readonly map: Value;
  /** p[B,S,E]: the combine weights. */
  readonly weights: Value;
  /** Attributes of `permute` and `pack`: the largest number of rows. */
  readonly rows: Attrs;
}

/** Builds the logits: `h` normalised [B,S,D] → [B,S,E]. With precision fp32 the f32 sums of products are not rounded. */
export function logitsOf({ at, weight, bias, sample, random }: ModuleBuilder, h: Value, { router }: Moe): Value {
  const eps = router.jitter;
  const x = eps === null ? h : jitter.of({ x: h, sample }, { eps, ...random("moe.jitter") }, at("moe.jitter"));
  const logits = gemm.of({ x, w: weight("router", "D,E") }, {}, at("moe.router"));
  const exact = router.precision === "fp32" ? declared(logits, { dtype: "f32" }) : logits;
  return router.bias ? addBias.of({ x: exact, bias: bias("router.bias", "E") }, {}, at("moe.router_bias")) : exact;
}

/** Builds the routing of logits [B,S,E], with balancing losses and counts. */
export function route(module: ModuleBuilder, moe: Moe, logits: Value): Routing {
  const { router } = moe;
  const at = (name: string) => module.at(`moe.${name}`);
  const scores = scoresOf[router.score].of({ x: logits }, {}, at("scores"));
  const chosen = chooseExperts(module, moe, logits, scores);
  const weights = combineWeights.of(
    { p: scores, c: chosen.map },
    { normalize: Number(router.normalize_top_k), scale: router.scaling },
    at("combine_weights"),
  );
  const { map, rows } = withinCapacity(module, moe, { ...chosen, weights });
  if (chosen.bias && router.expert_bias) module.updateInputs.set(chosen.bias, expertLoad.of({ c: map }, {}, at("expert_load")));
  balance(module, moe, { logits, scores, map: chosen.map });
  addCounts(module, chosen.map, map);
  addEntropy(module, scores);
  return { map, weights, rows };
}
const scoresOf = { softmax, sigmoid, sqrt_softplus: sqrtSoftplus };

/** A map of experts and the limits on its rows. */
interface Choice {
  readonly map: Value;
  readonly rows: Attrs;
  /** The bias that was added to scores. */
  readonly bias?: Value;
}
/** The largest number of iterations of Sinkhorn's method; about ten are usual. */
const MOST_ROUNDS = 1000;

/** Builds the map of experts for each token, before capacity is applied. */
function chooseExperts(module: ModuleBuilder, moe: Moe, logits: Value, scores: Value): Choice {
  const { top_k: k, experts: E, router } = moe;
  const { train, model } = module.job;
  const id = module.at("moe.top_k_mask");
  const P = train.micro_batch;
  const rows = { k };
  if (router.force === "uniform")
    return { map: uniformMask.of({ x: logits }, { k, S0: model.seq, E0: E, ...orderOf(module.job) }, id), rows };
  if (router.type === "expert_choice") {
    const quota = capacityOf(moe, P * model.seq, moe.capacity === "dropless" ? 1 : moe.capacity.factor);
    const map = expertChoiceMask.of({ p: scores }, { P, capacity: quota }, id);
    return { map, rows: { k: E, quota, sequences: P, positions: model.seq } };
  }
  const by = evenBy(router);
  if (by === "sinkhorn") {
    const even = sinkhorn.of({ x: logits }, { P, most: MOST_ROUNDS }, module.at("moe.sinkhorn"));
    return { map: topKMask.of({ x: even }, { k }, id), rows };
  }
  if (by === "quantile") {
    const bias = module.state("router_beta", "E", { name: "quantile", op: quantileUpdate, attrs: { ema: router.quantile_ema } });
    const statistic = quantile.of({ x: logits, bias }, { P, k, count: train.global_batch / P }, module.at("moe.quantile"));
    module.updateInputs.set(bias, statistic);
    return { map: topKMaskBiased.of({ x: logits, bias }, { k, sign: -1 }, id), rows };
  }
  const { groups, group_top_k, group_scores } = router;
  const limits = { k, ...(groups > 1 ? { groups, group_top_k, group_scores } : {}) };
  // normalised softmax weights depend on the chosen logits only, so experts and groups are ranked by logits
  const x = router.score === "softmax" && router.normalize_top_k ? logits : scores;
  if (!router.expert_bias) return { map: topKMask.of({ x }, limits, id), rows };
  const bias = module.state("router_bias", "E", { name: "expert_bias", op: biasUpdate, attrs: { rate: router.bias_rate } });
  return { map: topKMaskBiased.of({ x, bias }, { ...limits, sign: 1 }, id), bias, rows };
}

/** Returns the capacity of an expert for `tokens` tokens: factor × its even share, at most all tokens. */
const capacityOf = ({ top_k, experts }: Moe, tokens: number, factor: number): number =>
  Math.min(tokens, Math.ceil(((tokens * top_k) / experts) * factor));

/** Applies the capacity of experts. It counts the tokens that one rank routes at once, after sequence and context sharding. */
function withinCapacity(
  { job, at }: ModuleBuilder,
  moe: Moe,
  { map, rows, weights }: Choice & { weights: Value },
): Pick<Routing, "map" | "rows"> {
  const { capacity, router } = moe;
  if (capacity === "dropless" || router.type === "expert_choice") return { map, rows };
  const { parallel, model, train } = job;
  const P = train.micro_batch;
  const L = model.seq / (parallel.context * (parallel.sequence ? parallel.tensor : 1));
  const limit = capacityOf(moe, P * L, capacity.factor);
  if (limit === P * L && !capacity.pad) return { map, rows };
  const attrs = { P, L, capacity: limit, position: Number(capacity.drop === "position"), pad: Number(capacity.pad) };
  const quota = { quota: limit, sequences: P, positions: L };
  return {
    map: drop.of({ p: weights, c: map }, attrs, at("moe.apply_capacity")),
    rows: { k: capacity.pad ? moe.experts : moe.top_k, ...quota },
  };
}

interface Routed {
  readonly logits: Value;
  readonly scores: Value;
  readonly map: Value;
}
/**
 * Adds balancing losses on Σ_e n_e · Σ_t p_te (Switch, GShard), averaged over the groups of tokens that they are computed for. n counts
 * the k best scores per token without bias, groups and capacity; p are the normalised scores.
 */
function balance({ at, job, losses }: ModuleBuilder, { top_k: k, experts: E, router }: Moe, { logits, scores, map }: Routed): void {
  const { train, parallel, model } = job;
  const S = model.seq;
  const weight = hasTokenWeights(job) ? { weight: "aux_weight" as const } : {};
  const add = (value: Value) => losses.push({ name: "aux_loss", value, ...weight });
  const active = balancesOf(router).filter(({ coeff }) => coeff > 0);
  if (active.length) {
    const plain = router.groups === 1 && !router.expert_bias && router.force === "none";
    const c = plain ? map : topKMask.of({ x: logits }, { k }, at("moe.plain_top_k_mask"));
    const p = router.score === "softmax" ? scores : normalize.of({ p: scores }, {}, at("moe.shares"));
    /** Returns the factor of a loss over groups of `tokens` tokens, `count` groups per step. */
    const factor = (coeff: number, tokens: number, count: number): number => (coeff * E) / (k * tokens * tokens * count);
    const per = (name: string, P: number, coeff: number): Value => {
      const n = expertCounts.of({ c }, { P }, at(`moe.${name}_counts`));
      return auxLoss.of({ p, n }, { P, c: factor(coeff, P * S, train.global_batch / P) }, at(`moe.${name}`));
    };
    for (const { by, coeff } of active) {
      if (by === "aux_loss") add(per(by, train.micro_batch, coeff));
      if (by === "seq_aux_loss") add(per(by, 1, coeff));
      if (by !== "global_aux_loss") continue;
      // one loss for the microbatch of all data ranks; in Megatron Core the weight of this loss falls with the number of data ranks,
      // because it averages over them a sum that is already divided by their tokens
      const sequences = train.micro_batch * parallel.data;
      const n = expertLoad.of({ c }, {}, at("moe.global_load"));
      const mean = runningMean.of({ n }, { choices: sequences * S * k }, at("moe.global_mean"));
      const c2 = factor(coeff, sequences * S, train.global_batch / sequences);
      add(globalAuxLoss.of({ p, n: mean }, { c: c2 }, at("moe.global_aux_loss")));
    }
  }
  if (router.z_coeff > 0)
    losses.push({
      name: "z_loss",
      ...weight,
      value: zLoss.of({ x: logits }, { c: router.z_coeff / (train.global_batch * S) }, at("moe.z_loss")),
    });
}

/** Adds the entropy of the scores, if the job asks for it: the mean over the tokens of a step and the layers with experts. */
function addEntropy({ job, at, losses }: ModuleBuilder, scores: Value): void {
  const { train, model } = job;
  if (!train.metrics?.router_entropy) return;
  const c = 1 / (train.global_batch * model.seq * expertLayersOf(model));
  losses.push({ name: "router_entropy", value: routerEntropy.of({ p: scores }, { c }, at("moe.router_entropy")) });
}

/** Adds the counts of a step: tokens per expert, and the dropped rows if a capacity applies. */
function addCounts({ job, at, losses }: ModuleBuilder, chosen: Value, kept: Value): void {
  const row = losses.filter(({ name }) => name === "expert_loads").length;
  losses.push({
    name: "expert_loads",
    value: expertLoads.of({ c: chosen }, { T: expertLayersOf(job.model), row }, at("moe.expert_loads")),
  });
  if (kept !== chosen) losses.push({ name: "dropped_rows", value: droppedRows.of({ c: chosen, d: kept }, {}, at("moe.dropped_rows")) });
}
