/**
 * The mixture of experts of one layer: router → permute → grouped GEMMs → unpermute. Dispatch and combine are moves that `shard`
 * inserts between them. Balancing losses stand beside.
 */
import type { Job } from "../schemas/job.ts";
import type { Part } from "./modelParts.ts";
import { auxLoss, tally } from "./ops/balance.ts";
import { gemm, groupedGemm } from "./ops/linear.ts";
import { pack, permute, swigluRows, unpermute } from "./ops/moe.ts";
import type { Value } from "./ops/op.ts";
import { choose, softmax, weigh, zLoss } from "./ops/router.ts";

type Moe = NonNullable<Job["model"]["moe"]>;

/** `h` normalised [B,S,D] → what is added to the residual stream [B,S,D]. */
export function experts(part: Part, h: Value, moe: Moe): Value {
  const { weight, job, losses } = part;
  const { train } = job;
  const at = (name: string) => part.at(`moe.${name}`);
  const { router } = moe;
  const routing = { k: moe.top_k };
  // the dispatcher `all_gather`: tokens are gathered over ep, and each rank permutes those of its own experts
  const pin = (v: Value) => {
    if (moe.dispatch === "all_gather") v.node!.pin = { dim: "E", axis: "ep", path: "model.moe.dispatch" };
    return v;
  };
  const logits = gemm.of({ x: h, w: weight("router", "D,E") }, {}, at("router"));
  const scores = softmax.of({ x: logits }, {}, at("scores"));
  const c = choose.of({ x: logits }, routing, at("choose"));
  const probs = weigh.of({ p: scores, c }, { normalize: Number(router.normalize_top_k) }, at("weigh"));
  const rows = pin(permute.of({ x: h, c }, routing, at("permute")));
  const w = (name: string, dims: string, r: Value) => groupedGemm.of({ x: r, w: weight(name, dims) }, {}, at(name));
  // the router's weight travels beside the row and is applied inside the activation, as Megatron Core does
  const weights = pin(pack.of({ p: probs, c }, routing, at("pack")));
  const act = swigluRows.of({ gate: w("w1", "E@ep,D,F@etp", rows), up: w("w3", "E@ep,D,F@etp", rows), p: weights }, {}, at("swiglu"));
  const out = pin(unpermute.of({ r: w("w2", "E@ep,F@etp,D", act), c }, routing, at("unpermute")));

  const S = job.model.seq;
  const microbatches = train.global_batch / train.micro_batch;
  if (router.balance === "aux_loss" && router.aux_coeff > 0) {
    // Switch, GShard: coeff · E/(k·T²) · Σ_e n_e · Σ_t p_te with T the tokens of one microbatch, averaged over microbatches
    const T = train.micro_batch * S;
    const factor = (router.aux_coeff * moe.experts) / (moe.top_k * T * T * microbatches);
    const n = tally.of({ c }, { P: train.micro_batch }, at("tally"));
    losses.push({ name: "aux_loss", value: auxLoss.of({ p: scores, n }, { P: train.micro_batch, c: factor }, at("aux_loss")) });
  }
  if (router.z_coeff > 0)
    losses.push({ name: "aux_loss", value: zLoss.of({ x: logits }, { c: router.z_coeff / (train.global_batch * S) }, at("z_loss")) });
  return out;
}
