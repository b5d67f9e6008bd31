/** The memory of a job in closed form, without compiling it: what searches and `init` sort out choices by. */
import { sendsTokensOnce } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { paddedVocab } from "../../schemas/jobSizes.ts";
import { readLayout, runsInPairs } from "../passes/pipelineStages.ts";
import { parameterCount, routedCount } from "./parameterCount.ts";

/** Returns about how many bytes the fullest rank needs at its peak. */
export function memoryForecast(job: Job): number {
  const { model, parallel: p, train } = job;
  const bytes = train.precision === "fp32" ? 4 : 2;
  const routed = routedCount(model);
  const vocab = paddedVocab(model);
  const tables = (model.tie_embeddings ? 1 : 2) * vocab * model.hidden;
  const others = parameterCount({ ...model, vocab }) - routed - tables;
  // weights and gradients stay on every rank that uses them; optimizer state is sharded over the ranks that hold copies
  const held = (count: number, shards: number, copies: number) =>
    (count / shards) * (bytes + 4 + 12 / (p.distributed_optimizer ? copies : 1));
  const expertShards = p.expert * p.expert_tensor;
  const copies = p.data * p.context;
  /** The state of a stage with a share of the layers, and of the tables of the embedding and the head. */
  const state = (share: number, ofTables: number): number =>
    held(others * share, p.tensor, copies) +
    held(tables * ofTables, p.tensor, copies) +
    held(routed * share, expertShards, p.world / p.pipeline / expertShards);
  const tokens = (model.seq * train.micro_batch) / (p.tensor * p.context);
  const perLayer = tokens * bytes * activationsOfToken(job);
  const workspace = tokens * bytes * (activationsOfToken(withoutRecompute(job)) + 4 * model.hidden);
  const logits = tokens * vocab * (bytes + 4);
  const microbatches = train.global_batch / (train.micro_batch * p.data);
  const inPairs = runsInPairs(job);
  if (p.pipeline === 1)
    return state(1, 1) + perLayer * model.layers * Math.min(inPairs ? 2 : 1, microbatches) + Math.max(workspace, logits);
  const layers = layersOfStages(job);
  const stages = layers.map((own, s) => {
    const isLast = s === layers.length - 1;
    const kept = perLayer * own * Math.min(activationCopies(p, isLast ? p.pipeline - 1 : s, inPairs), microbatches);
    return state(own / model.layers, s === 0 || isLast ? 0.5 : 0) + kept + (isLast ? Math.max(workspace, logits) : workspace);
  });
  return Math.max(...stages);
}

/**
 * Returns the copies of the activations of a stage: the mean of its chunks. Interleaved, half of the chunks have two for each stage and the others
 * one; of the later stages, the last chunks of each half have fewer. In pairs one chunk has one more, and without chunks a stage has twice as many.
 */
export function activationCopies(
  { pipeline, virtual_pipeline: v }: Pick<Job["parallel"], "pipeline" | "virtual_pipeline">,
  stage: number,
  inPairs = false,
): number {
  if (v === 1) return (inPairs ? 2 : 1) * (pipeline - stage);
  const whole = 1.5 * pipeline * v;
  const changed = v % 2 === 0 ? -Math.max(0, 4 * (stage - pipeline / 2) + 2) : pipeline / 2 - 1 - 2 * stage;
  return (whole + changed + Number(inPairs)) / v;
}

/** Returns the layers of each stage. */
function layersOfStages({ model, parallel: { layout, pipeline } }: Job): number[] {
  const parts = layout === null ? "" : readLayout(layout);
  // where layers are spread evenly the first stage has the most memory
  if (typeof parts === "string") return [model.layers / pipeline, model.layers / pipeline];
  const layers = Array.from({ length: pipeline }, () => 0);
  for (const [v, part] of parts.entries()) layers[v % pipeline] = (layers[v % pipeline] ?? 0) + part.replaceAll(/[EL]/g, "").length;
  return layers;
}

const withoutRecompute = (job: Job): Job => ({ ...job, train: { ...job.train, recompute: { ...job.train.recompute, mode: "none" } } });

/** Elements that backward keeps of a token in a layer. */
function activationsOfToken({ model: m, parallel: p, train: { recompute } }: Job): number {
  if (recompute.mode === "full") return m.hidden;
  const isKept = (module: (typeof recompute.modules)[number]) => recompute.mode !== "selective" || !recompute.modules.includes(module);
  const heads = m.mla ? m.heads * (2 * m.head_dim + 2 * m.mla.v_dim) : 2 * (m.heads + m.kv_heads) * m.head_dim;
  const attention = m.mla && !isKept("mla_up_proj") ? m.heads * m.mla.v_dim + 2 * (m.mla.kv_rank + (m.mla.q_rank ?? 0)) : heads;
  const norms = (isKept("layernorm") ? 4 : 2) * m.hidden;
  if (!m.moe) return attention + norms + (isKept("mlp") ? 2 * m.ffn : 0);
  // in the worst case all ranks of a group choose the experts of one
  const worst = (p.expert * Math.min(m.moe.top_k, m.moe.experts / p.expert)) / m.moe.top_k;
  const rows = m.moe.top_k * (p.expert > 1 ? Math.min(worst, m.moe.rows_bound === "worst" ? worst : m.moe.rows_bound) : 1);
  // expert tensor ranks have the same rows where a token is sent once; elsewhere backward gathers them again
  const copies = sendsTokensOnce(m.moe) ? p.expert_tensor : 1;
  const ofRow = (isKept("moe_permute") ? copies : 0) * m.hidden + 2 * m.moe.ffn;
  const experts = isKept("moe") ? rows * ofRow + 2 * (m.moe.shared?.ffn ?? 0) : 0;
  return attention + norms + experts;
}
