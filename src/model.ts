/**
 * buildModel: the forward pass of a decoder-only transformer, dense or mixture of experts, and its losses. It says where
 * parameters are cut and how the first activation lies; nothing else about the mesh. Letters of dims: modelParts.ts.
 */
import { hasExperts, type Job } from "../schemas/job.ts";
import { attend } from "./modelAttention.ts";
import { dense } from "./modelDense.ts";
import { experts } from "./modelExperts.ts";
import { copyOf, type Loss, type Part, partOf, streamCut } from "./modelParts.ts";
import { add, gemm, gemmDgrad } from "./ops/linear.ts";
import { rmsnorm } from "./ops/norm.ts";
import type { Value } from "./ops/op.ts";
import { embed, mean, nll, pick, rowMax, sumExp, weightedSum } from "./ops/vocab.ts";

export function buildModel(job: Job): Loss[] {
  const { model: m } = job;
  const losses: Loss[] = [];
  const { eps } = m.norm;

  const first = partOf(job, 0, "", losses);
  const table = first.weight("embed", "V@tp,D");
  let x = embed.of({ ids: first.input("ids"), table }, {}, "embedding");
  x.cut = streamCut(job);

  for (let i = 0; i < m.layers; i++) {
    const layer = partOf(job, 1 + i, `layers.${i}.`, losses);
    const { at, gain } = layer;
    const a = rmsnorm.of({ x, gain: gain("norm1", "D") }, { eps }, at("attn.norm"));
    x = add.of({ a: x, b: attend(layer, a) }, {}, at("attn.residual"));
    const h = rmsnorm.of({ x, gain: gain("norm2", "D") }, { eps }, at("mlp.norm"));
    x = add.of({ a: x, b: m.moe && hasExperts(m, i) ? experts(layer, h, m.moe) : dense(layer, h, "H") }, {}, at("mlp.residual"));
  }

  const last = partOf(job, 1 + m.layers, "", losses);
  const y = rmsnorm.of({ x, gain: last.gain("norm", "D") }, { eps }, "final.norm");
  losses.push({ name: "loss", value: crossEntropy(last, logitsOf(last, y, table)) });
  return losses;
}

function logitsOf(part: Part, y: Value, table: Value): Value {
  const { model, parallel } = part.job;
  if (!model.tie_embeddings) return gemm.of({ x: y, w: part.weight("head", "D,V@tp") }, {}, "logits");
  // a tied table that both the first and the last stage use stands on both
  return gemmDgrad.of({ dy: y, w: parallel.pipeline > 1 ? copyOf(table, part.position) : table }, {}, "logits");
}

/** Over a vocabulary shard: log Σ exp(x - max) + max - x[target]; its mean over the tokens of a step that are learnt from. */
function crossEntropy(part: Part, logits: Value): Value {
  const max = rowMax.of({ x: logits }, {}, "loss.max");
  const s = sumExp.of({ x: logits, m: max }, {}, "loss.sum_exp");
  const p = pick.of({ x: logits, target: part.input("labels") }, {}, "loss.pick");
  const l = nll.of({ m: max, s, p }, {}, "loss.nll");
  const { train, model, data } = part.job;
  if (data.labels !== null) return weightedSum.of({ l, weight: part.input("weights", "f32") }, {}, "loss");
  return mean.of({ l }, { count: train.global_batch * model.seq }, "loss");
}
