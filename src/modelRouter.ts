/** The router of one layer: logits → the map of experts that each token goes to, and their weights. Balancing stands beside. */
import { balancesOf, type Job } from "../schemas/job.ts";
import type { Part } from "./modelParts.ts";
import { auxLoss, biasUpdate, globalAuxLoss, loads, runningMean, tally } from "./ops/balance.ts";
import { cast, gemm } from "./ops/linear.ts";
import type { Value } from "./ops/op.ts";
import { choose, chooseBiased, normalize, sigmoid, softmax, sqrtSoftplus, weigh, zLoss } from "./ops/router.ts";

export type Moe = NonNullable<Job["model"]["moe"]>;
export interface Routing {
  /** c[B,S,E]: ones where a token goes to an expert. */
  readonly map: Value;
  /** p[B,S,E]: what each of those counts for. */
  readonly weights: Value;
}

/** `h` normalised [B,S,D] → logits [B,S,E]. */
export function logitsOf({ at, weight }: Part, h: Value, { router }: Moe): Value {
  const x = router.precision === "fp32" ? widened(h, at("moe.input")) : h;
  return gemm.of({ x, w: weight("router", "D,E") }, {}, at("moe.router"));
}
/** The value in f32, whatever the model's precision. */
function widened(v: Value, id: string): Value {
  if (v.dtype === "f32") return v;
  const wide = cast.of({ x: v }, {}, id);
  wide.dtype = "f32";
  return wide;
}

export function route(part: Part, moe: Moe, logits: Value): Routing {
  const { router } = moe;
  const at = (name: string) => part.at(`moe.${name}`);
  const scores = scoresOf[router.score].of({ x: logits }, {}, at("scores"));
  const map = choice(part, moe, logits, scores);
  const weights = weigh.of({ p: scores, c: map }, { normalize: Number(router.normalize_top_k), scaling: router.scaling }, at("weigh"));
  balance(part, moe, { logits, scores, map });
  return { map, weights };
}
const scoresOf = { softmax, sigmoid, sqrt_softplus: sqrtSoftplus };

/** Which experts each token goes to. */
function choice(part: Part, { top_k: k, router }: Moe, logits: Value, scores: Value): Value {
  const at = (name: string) => part.at(`moe.${name}`);
  const { groups, group_top_k, group_scores } = router;
  const limits = { k, ...(groups > 1 ? { groups, group_top_k, group_scores } : {}) };
  // normalised, a softmax over the chosen logits alone: the others play no part, and groups are worth what their logits are
  const x = router.score === "softmax" && router.normalize_top_k ? logits : scores;
  if (!router.expert_bias) return choose.of({ x }, limits, at("choose"));
  const bias = part.state("router_bias", "E", { name: "expert_bias", op: biasUpdate, attrs: { rate: router.bias_rate } });
  const c = chooseBiased.of({ x, bias }, { ...limits, sign: 1 }, at("choose"));
  bias.leaf!.counted = loads.of({ c }, {}, at("loads"));
  return c;
}

interface Routed {
  readonly logits: Value;
  readonly scores: Value;
  readonly map: Value;
}
/**
 * Losses on Σ_e n_e · Σ_t p_te (Switch, GShard), averaged over what they are computed for: n counts plain choices, the k best
 * scores with no bias, no groups, and before anything is dropped; p are the scores' shares.
 */
function balance({ at, job, losses }: Part, { top_k: k, experts: E, router }: Moe, { logits, scores, map }: Routed): void {
  const { train, parallel, model } = job;
  const S = model.seq;
  const add = (value: Value) => losses.push({ name: "aux_loss", value });
  const weighed = balancesOf(router).filter(({ coeff }) => coeff > 0);
  if (weighed.length) {
    const plain = router.groups === 1 && !router.expert_bias;
    const c = plain ? map : choose.of({ x: logits }, { k }, at("moe.plain_choose"));
    const p = router.score === "softmax" ? scores : normalize.of({ p: scores }, {}, at("moe.shares"));
    /** The loss of `tokens` tokens that are counted together, of which a step has `count`. */
    const factor = (coeff: number, tokens: number, count: number): number => (coeff * E) / (k * tokens * tokens * count);
    const per = (name: string, P: number, coeff: number): Value => {
      const n = tally.of({ c }, { P }, at(`moe.${name}_tally`));
      return auxLoss.of({ p, n }, { P, c: factor(coeff, P * S, train.global_batch / P) }, at(`moe.${name}`));
    };
    for (const { by, coeff } of weighed) {
      if (by === "aux_loss") add(per(by, train.micro_batch, coeff));
      if (by === "seq_aux_loss") add(per(by, 1, coeff));
      if (by !== "global_aux_loss") continue;
      const sequences = train.micro_batch * parallel.data;
      const n = loads.of({ c }, {}, at("moe.global_loads"));
      const mean = runningMean.of({ n }, { choices: sequences * S * k }, at("moe.global_mean"));
      const c2 = factor(coeff, sequences * S, train.global_batch / sequences);
      add(globalAuxLoss.of({ p, n: mean }, { c: c2 }, at("moe.global_aux_loss")));
    }
  }
  if (router.z_coeff > 0) add(zLoss.of({ x: logits }, { c: router.z_coeff / (train.global_batch * S) }, at("moe.z_loss")));
}
