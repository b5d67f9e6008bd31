/**
 * The forward pass of a decoder-only transformer, dense or mixture of experts, and its losses. It declares the sharding of parameters
 * and of the residual stream. builder.ts lists the letters of dims.
 */
import { evenBy, hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { paddedVocab } from "../../schemas/jobSizes.ts";
import { hasTokenWeights } from "../../schemas/lossWeights.ts";
import { add, gemm, gemmDgrad } from "../ops/gemm.ts";
import type { Attrs, Value } from "../ops/op.ts";
import { embed, mean, nll, rowMax, softmaxTerms, sourceLosses, weightedSum } from "../ops/vocab.ts";
import { copyOf, dropped, inStream, type ModelGraph, type ModelGraphBuilder, type ModuleBuilder, moduleBuilders } from "./builder.ts";
import { layer } from "./layer.ts";
import { depths } from "./mtp.ts";
import { normed } from "./norms.ts";
import { depthPart, headAt, layerAt, layerPart } from "./positions.ts";

/** The outputs of the transformer before the head. */
interface Trunk {
  readonly y: Value;
  /** The hidden states of the depths of multi-token prediction. */
  readonly further: readonly Value[];
  readonly last: ModuleBuilder;
  logitsOf(y: Value, id: string): Value;
}

/** Returns the forward graph of a model. */
export function buildModel(job: Job): ModelGraph {
  const graph: ModelGraphBuilder = { losses: [], updateInputs: new Map() };
  const { losses } = graph;
  const { y, further, last, logitsOf } = trunk(job, graph);
  // deepest first: then the head's addend of a shared gradient precedes that of the next depth on every pipeline layout
  for (const [i, h] of [...further.entries()].reverse()) {
    const at = { prefix: depthPart(i), depth: i + 1 };
    const value = crossEntropy(last, logitsOf(h, `${at.prefix}logits`), at);
    losses.push({ name: "mtp_loss", value, depth: at.depth, weight: "mtp_coeff" });
  }
  losses.push({ name: "loss", value: crossEntropy(last, logitsOf(y, "logits"), { prefix: "" }) });
  return graph;
}

/**
 * Returns the forward graph of an evaluation: the weighted loss of the next token by source [sources]. Nothing in it is random, and
 * experts are not balanced.
 */
export function buildEvaluation(job: Job, sources: number): ModelGraph {
  const { y, last, logitsOf } = trunk(evaluated(job), { losses: [], updateInputs: new Map() });
  const l = tokenLosses(last, logitsOf(y, "logits"), { prefix: "" });
  const value = sourceLosses.of(
    { l, weight: last.input({ source: "weights" }, "f32"), source: last.input({ source: "sources" }) },
    { K: sources },
    "loss",
  );
  return { losses: [{ name: "evaluation", value }], updateInputs: new Map() };
}

/** Returns the job whose forward pass an evaluation runs. Sinkhorn's method balances the tokens of training; without it the best scores win. */
function evaluated(job: Job): Job {
  const { model } = job;
  const { moe } = model;
  const routed = moe && {
    ...moe,
    router: { ...moe.router, jitter: null, ...(evenBy(moe.router) === "sinkhorn" && { balance: "none" as const }) },
  };
  return { ...job, model: { ...model, moe: routed, dropout: { attention: 0, hidden: 0 } } };
}

function trunk(job: Job, graph: ModelGraphBuilder): Trunk {
  const { model: m } = job;

  const moduleAt = moduleBuilders(job, graph);
  const first = moduleAt(0, "");
  const table = first.vocabulary("embed", "V@tp,D");
  const embedded = embed.of({ ids: first.input({ source: "ids" }), table }, {}, "embedding");
  let x = dropped(first, withPositions(first, inStream(job, embedded)), "embedding.dropout");

  for (let i = 0; i < m.layers; i++) x = layer(moduleAt(layerAt(i), layerPart(i)), x, hasExperts(m, i));

  // the final norm is at the first depth of multi-token prediction if there is one, else at the head
  const after = moduleAt(layerAt(m.layers), "");
  const y = normed(after, x, "D", { gain: "norm", id: "final.norm" });
  const tableAt = (position: number): Value => copyOf(table, position);
  const further = depths(job, y, tableAt, moduleAt);

  const last = moduleAt(headAt(m), "");
  const head = m.tie_embeddings ? tableAt(last.position) : last.vocabulary("head", "D,V@tp");
  const logitsOf = (y: Value, id: string): Value =>
    m.tie_embeddings ? gemmDgrad.of({ dy: y, w: head }, {}, id) : gemm.of({ x: y, w: head }, {}, id);
  return { y, further, last, logitsOf };
}

/** Adds the learned vector of each token's position, if the model has them. */
function withPositions(module: ModuleBuilder, x: Value): Value {
  if (module.job.model.positions !== "learned") return x;
  const table = module.vocabulary("position_table", "P,D");
  const added = embed.of({ ids: module.input({ source: "positions" }), table }, {}, "embedding.by_position");
  return inStream(module.job, add.of({ a: x, b: added }, {}, "embedding.with_positions"));
}

/** The names of a loss, and its depth of multi-token prediction. */
interface LossPlace {
  readonly prefix: string;
  readonly depth?: number;
}

/** Cross-entropy of each token that works on vocabulary shards: log Σ exp(x - max) + max - x[target]. */
function tokenLosses(module: ModuleBuilder, logits: Value, { prefix, depth }: LossPlace): Value {
  const at = (name: string): string => `${prefix}${name}`;
  const { vocab } = module.job.model;
  const attrs: Attrs = paddedVocab(module.job.model) === vocab ? {} : { ids: vocab };
  const max = rowMax.of({ x: logits }, attrs, at("loss.max"));
  const ahead = depth === undefined ? {} : { depth };
  const { s, p } = softmaxTerms.all({ x: logits, m: max, target: module.input({ source: "labels", ...ahead }) }, attrs, at("loss.terms"));
  return nll.of({ m: max, s, p }, {}, at("loss.nll"));
}

/** The cross-entropy of a microbatch: the sum over the tokens that have a weight, or the mean over the tokens of a step. */
function crossEntropy(module: ModuleBuilder, logits: Value, place: LossPlace): Value {
  const { prefix, depth } = place;
  const at = (name: string): string => `${prefix}${name}`;
  const l = tokenLosses(module, logits, place);
  const ahead = depth === undefined ? {} : { depth };
  const { train, model } = module.job;
  // the last tokens of a sequence have no further token to predict, so their weight is 0
  if (hasTokenWeights(module.job) || depth)
    return weightedSum.of({ l, weight: module.input({ source: "weights", ...ahead }, "f32") }, {}, at("loss"));
  return mean.of({ l }, { count: train.global_batch * model.seq }, at("loss"));
}
