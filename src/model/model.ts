/**
 * The forward pass of a decoder-only transformer, dense or mixture of experts, and its losses. It declares the sharding of parameters
 * and of the residual stream. builder.ts lists the letters of dims.
 */
import { hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { gemm, gemmDgrad } from "../ops/linear.ts";
import { rmsnorm } from "../ops/norm.ts";
import type { Value } from "../ops/op.ts";
import { embed, mean, nll, rowMax, softmaxTerms, weightedSum } from "../ops/vocab.ts";
import { copyOf, dropped, inStream, type ModelGraph, type ModelGraphBuilder, type ModuleBuilder, moduleBuilders } from "./builder.ts";
import { layer } from "./layer.ts";
import { depths } from "./mtp.ts";
import { headAt, layerAt } from "./positions.ts";

/** Returns the forward graph of a model. */
export function buildModel(job: Job): ModelGraph {
  const { model: m } = job;
  const graph: ModelGraphBuilder = { losses: [], updateInputs: new Map() };
  const { losses } = graph;
  const { eps } = m.norm;

  const moduleAt = moduleBuilders(job, graph);
  const first = moduleAt(0, "");
  const table = first.vocabulary("embed", "V@tp,D");
  const embedded = embed.of({ ids: first.input({ source: "ids" }), table }, {}, "embedding");
  let x = dropped(first, inStream(job, embedded), "embedding.dropout");

  for (let i = 0; i < m.layers; i++) x = layer(moduleAt(layerAt(i), `layers.${i}.`), x, hasExperts(m, i));

  // the final norm is at the first depth of multi-token prediction if there is one, else at the head
  const after = moduleAt(layerAt(m.layers), "");
  const y = rmsnorm.of({ x, gain: after.gain("norm", "D") }, { eps }, "final.norm");
  const tableAt = (position: number): Value => copyOf(table, position);
  const further = depths(job, y, tableAt, moduleAt);

  const last = moduleAt(headAt(m), "");
  const head = m.tie_embeddings ? tableAt(last.position) : last.vocabulary("head", "D,V@tp");
  const logitsOf = (y: Value, id: string): Value =>
    m.tie_embeddings ? gemmDgrad.of({ dy: y, w: head }, {}, id) : gemm.of({ x: y, w: head }, {}, id);
  // deepest first: then the head's addend of a shared gradient precedes that of the next depth on every pipeline layout
  for (const [i, h] of [...further.entries()].reverse()) {
    const at = { prefix: `mtp.${i}.`, depth: i + 1 };
    losses.push({ name: "mtp_loss", value: crossEntropy(last, logitsOf(h, `${at.prefix}logits`), at), weight: "mtp_coeff" });
  }
  losses.push({ name: "loss", value: crossEntropy(last, logitsOf(y, "logits"), { prefix: "" }) });
  return graph;
}

/**
 * Cross-entropy that works on vocabulary shards: log Σ exp(x - max) + max - x[target] per token, averaged over the tokens of a step
 * that have a weight.
 */
function crossEntropy(
  module: ModuleBuilder,
  logits: Value,
  { prefix, depth }: { readonly prefix: string; readonly depth?: number },
): Value {
  const at = (name: string): string => `${prefix}${name}`;
  const max = rowMax.of({ x: logits }, {}, at("loss.max"));
  const ahead = depth === undefined ? {} : { depth };
  const { s, p } = softmaxTerms.all({ x: logits, m: max, target: module.input({ source: "labels", ...ahead }) }, {}, at("loss.terms"));
  const l = nll.of({ m: max, s, p }, {}, at("loss.nll"));
  const { train, model, data } = module.job;
  // the last tokens of a sequence have no further token to predict, so their weight is 0
  if (data.labels !== null || depth)
    return weightedSum.of({ l, weight: module.input({ source: "weights", ...ahead }, "f32") }, {}, at("loss"));
  return mean.of({ l }, { count: train.global_batch * model.seq }, at("loss"));
}
