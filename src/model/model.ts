/**
 * buildModel: the forward pass of a decoder-only transformer, dense or mixture of experts, and its losses. It says where
 * parameters are cut and how the first activation lies; nothing else about the mesh. Letters of dims: modelParts.ts.
 */
import { hasExperts, type Job } from "../../schemas/job.ts";
import { gemm, gemmDgrad } from "../ops/linear.ts";
import { rmsnorm } from "../ops/norm.ts";
import type { Value } from "../ops/op.ts";
import { embed, gather, mean, nll, rowMax, sumExp, weightedSum } from "../ops/vocab.ts";
import { headAt, layerAt, pipelineOf, stageOfVirtual } from "../passes/pipeline.ts";
import { copyOf, dropped, type Loss, type ModuleBuilder, moduleBuilders, streamCut } from "./builder.ts";
import { layer } from "./layer.ts";
import { depths } from "./mtp.ts";

export function buildModel(job: Job): Loss[] {
  const { model: m } = job;
  const losses: Loss[] = [];
  const { eps } = m.norm;

  const partAt = moduleBuilders(job, losses);
  const first = partAt(0, "");
  const table = first.weight("embed", "V@tp,D");
  let x = embed.of({ ids: first.input("ids"), table }, {}, "embedding");
  x.shardAxes = streamCut(job);
  x = dropped(first, x, "embedding.dropout");

  for (let i = 0; i < m.layers; i++) x = layer(partAt(layerAt(i), `layers.${i}.`), x, hasExperts(m, i));

  // where multi-token prediction begins, if there is some; else with the head
  const after = partAt(layerAt(m.layers), "");
  const y = rmsnorm.of({ x, gain: after.gain("norm", "D") }, { eps }, "final.norm");
  const tableAt = standing(job, table);
  const further = depths(job, y, tableAt, partAt);

  const last = partAt(headAt(m), "");
  const head = m.tie_embeddings ? tableAt(last.position) : last.weight("head", "D,V@tp");
  const logitsOf = (y: Value, id: string): Value =>
    m.tie_embeddings ? gemmDgrad.of({ dy: y, w: head }, {}, id) : gemm.of({ x: y, w: head }, {}, id);
  // the deepest first: of a gradient that head and next depth add to, the head's part is then there before, wherever they stand
  for (const [i, h] of [...further.entries()].reverse()) {
    const at = { prefix: `mtp.${i}.`, suffix: `_${i + 1}` };
    losses.push({ name: "mtp_loss", value: crossEntropy(last, logitsOf(h, `${at.prefix}logits`), at), weight: "mtp_coeff" });
  }
  losses.push({ name: "loss", value: crossEntropy(last, logitsOf(y, "logits"), { prefix: "", suffix: "" }) });
  return losses;
}

/** The embedding's table by position: each stage that uses it has one copy. */
function standing(job: Job, table: Value): (position: number) => Value {
  const pipeline = pipelineOf(job);
  const stageOf = (position: number): number => stageOfVirtual(pipeline, pipeline.of[position]!);
  const copies = new Map([[stageOf(0), table]]);
  return (position) => {
    const copy = copies.get(stageOf(position)) ?? copyOf(table, position);
    copies.set(stageOf(position), copy);
    return copy;
  };
}

/** Over a vocabulary shard: log Σ exp(x - max) + max - x[target]; its mean over the tokens of a step that are learnt from. */
function crossEntropy(
  module: ModuleBuilder,
  logits: Value,
  { prefix, suffix }: { readonly prefix: string; readonly suffix: string },
): Value {
  const at = (name: string): string => `${prefix}${name}`;
  const max = rowMax.of({ x: logits }, {}, at("loss.max"));
  const s = sumExp.of({ x: logits, m: max }, {}, at("loss.sum_exp"));
  const p = gather.of({ x: logits, target: module.input(`labels${suffix}`) }, {}, at("loss.pick"));
  const l = nll.of({ m: max, s, p }, {}, at("loss.nll"));
  const { train, model, data } = module.job;
  // the last tokens of a sequence have nothing further to predict
  if (data.labels !== null || suffix) return weightedSum.of({ l, weight: module.input(`weights${suffix}`, "f32") }, {}, at("loss"));
  return mean.of({ l }, { count: train.global_batch * model.seq }, at("loss"));
}
