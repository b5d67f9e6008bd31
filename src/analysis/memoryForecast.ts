/** The memory of a job in closed form, without compiling it: what searches and `init` sort out choices by. */
import { type Job, paddedVocab } from "../../schemas/job.ts";
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
  const stage = 1 / p.pipeline;
  const expertShards = p.expert * p.expert_tensor;
  const copies = p.data * p.context;
  const state =
    held(others * stage, p.tensor, copies) +
    held(tables * (p.pipeline > 1 ? 0.5 : 1), p.tensor, copies) +
    held(routed * stage, expertShards, (p.world * stage) / expertShards);
  const tokens = (model.seq * train.micro_batch) / (p.tensor * p.context);
  const perLayer = tokens * bytes * activationsOfToken(job);
  const workspace = tokens * bytes * (activationsOfToken(withoutRecompute(job)) + 4 * model.hidden);
  const logits = tokens * vocab * (bytes + 4);
  if (p.pipeline === 1) return state + perLayer * model.layers + Math.max(workspace, logits);
  // the first stage has a microbatch in flight for each stage, interleaved chunks some more; the last has one, and the logits
  const microbatches = train.global_batch / (train.micro_batch * p.data);
  const layers = model.layers * stage + 1;
  const further = p.virtual_pipeline > 1 ? (p.pipeline - 1) / (p.pipeline * p.virtual_pipeline) : 0;
  const first = perLayer * layers * Math.min(p.pipeline * (1 + further), microbatches) + workspace;
  const last = perLayer * layers * (1 + further) + Math.max(workspace, logits);
  return state + Math.max(first, last);
}

const withoutRecompute = (job: Job): Job => ({ ...job, train: { ...job.train, recompute: { ...job.train.recompute, mode: "none" } } });

/** Elements that backward keeps of a token in a layer. */
function activationsOfToken({ model: m, parallel: p, train: { recompute } }: Job): number {
  if (recompute.mode === "full") return m.hidden;
  const isKept = (module: (typeof recompute.modules)[number]) => recompute.mode !== "selective" || !recompute.modules.includes(module);
  const heads = m.mla ? m.heads * (2 * m.head_dim + 2 * m.mla.v_dim) : 2 * (m.heads + m.kv_heads) * m.head_dim;
  const attention = m.mla && !isKept("mla_up_proj") ? m.heads * m.mla.v_dim + 2 * (m.mla.kv_rank + (m.mla.q_rank ?? 0)) : heads;
  const norms = (isKept("layernorm") ? 4 : 2) * m.hidden;
  if (!m.moe) return attention + norms + (isKept("mlp") ? 3 * m.ffn : 0);
  // in the worst case all ranks of a group choose the experts of one
  const worst = (p.expert * Math.min(m.moe.top_k, m.moe.experts / p.expert)) / m.moe.top_k;
  const rows = m.moe.top_k * (p.expert > 1 ? Math.min(worst, m.moe.rows_bound === "worst" ? worst : m.moe.rows_bound) : 1);
  const experts = isKept("moe") ? rows * (2 * m.hidden + 3 * m.moe.ffn) + 3 * (m.moe.shared?.ffn ?? 0) : 0;
  return attention + norms + experts;
}
