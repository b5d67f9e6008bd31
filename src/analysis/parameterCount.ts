/** The number of parameters of a model in closed form. */

import { isGated } from "../../schemas/activations.ts";
import { balancesOf, hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";

type Model = Job["model"];
type Moe = NonNullable<Model["moe"]>;

/** Returns the number of parameters of a model over all ranks, without compiling. A tied head counts once; router biases are included. */
export function parameterCount(model: Model): number {
  const { layers, hidden, vocab } = model;
  const norm = hidden * normSize(model);
  const attention = attentionCount(model) + 2 * norm; // before attention and before the feed-forward block
  const matrices = isGated(model.activation) ? 3 : 2;
  const dense = attention + matrices * hidden * model.ffn + (model.mlp_bias ? (matrices - 1) * model.ffn + hidden : 0);
  const sparse = model.moe ? attention + expertsCount(model.moe, hidden, matrices) : dense;
  const layer = (l: number): number => (hasExperts(model, l) ? sparse : dense);
  let sum = (model.tie_embeddings ? 1 : 2) * vocab * hidden + norm + (model.positions === "learned" ? model.max_positions * hidden : 0);
  for (let l = 0; l < layers; l++) sum += layer(l);
  // each depth of multi-token prediction has a layer of the last layer's kind, a projection 2D → D, and three norms
  return sum + depthsOf(model) * (layer(layers - 1) + 2 * hidden ** 2 + 3 * norm);
}

/** Returns the number of parameters of routed experts and of their routers: what a model has more than without experts to choose from. */
export const routedCount = (model: Model): number =>
  parameterCount(model) - parameterCount({ ...model, moe: model.moe && { ...model.moe, experts: 0 } });

/** The parameters of a norm for each element of a row: a gain, and a bias. */
const normSize = ({ norm }: Model): number => (norm.type === "layernorm" ? 2 : 1);

function attentionCount(model: Model): number {
  const { hidden, heads, kv_heads, head_dim, mla, qkv_bias, out_bias, qk_norm } = model;
  const bias = (qkv_bias ? (heads + 2 * kv_heads) * head_dim : 0) + (out_bias ? hidden : 0);
  if (mla === null) {
    const gains = { none: 0, head: 2 * head_dim, full: (heads + kv_heads) * head_dim }[qk_norm];
    return 2 * hidden * head_dim * (heads + kv_heads) + bias + gains * normSize(model);
  }
  const { q_rank, kv_rank, nope_dim, rope_dim, v_dim } = mla;
  const queries = heads * (nope_dim + rope_dim);
  // a latent has a projection before, a norm, and a projection after
  const norm = mla.norm ? normSize(model) : 0;
  const queryCount = q_rank === null ? hidden * queries : q_rank * (hidden + norm + queries);
  return queryCount + hidden * (kv_rank + rope_dim) + kv_rank * (norm + heads * (nope_dim + v_dim)) + heads * v_dim * hidden + bias;
}

/** `matrices`: how many matrices an expert has. */
function expertsCount({ experts, ffn, latent, shared, router, bias }: Moe, hidden: number, matrices: number): number {
  const biases = (bias ? experts * ((matrices - 1) * ffn + (latent ?? hidden)) : 0) + (router.bias ? experts : 0);
  const routed = biases + matrices * experts * (latent ?? hidden) * ffn + (latent === null ? 0 : 2 * hidden * latent);
  const routerCount = hidden * experts + (router.expert_bias || balancesOf(router).some(({ by }) => by === "quantile") ? experts : 0);
  return routed + routerCount + (shared ? matrices * hidden * shared.ffn + (shared.gate ? hidden : 0) : 0);
}
