/** The floating-point operations that a model needs, without what a plan computes twice. */
import { hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { parameterCount } from "./parameterCount.ts";

/**
 * Returns the FLOP of one sequence, forward and backward: 6 for each token and each parameter that the token uses (experts: top_k of
 * them; an embedding is looked up), and 6·S for each token, layer and channel of the heads for the scores and sums of causal attention,
 * which see half of the sequence on average. Recomputation does not count.
 */
export function modelFlops(model: Job["model"]): number {
  const { layers, seq, vocab, hidden, tie_embeddings, moe, mtp } = model;
  const routers = moe ? Array.from({ length: layers }, (_, l) => Number(hasExperts(model, l))).reduce((a, b) => a + b, 0) : 0;
  const used = moe ? { ...model, moe: { ...moe, experts: moe.top_k } } : model;
  const unused = moe ? routers * hidden * (moe.experts - moe.top_k) : 0;
  // the head is a product even if it shares its table with the embedding; each further depth has the product of the head again
  const parameters = parameterCount(used) + unused - (tie_embeddings ? 0 : vocab * hidden) + (mtp?.layers ?? 0) * vocab * hidden;
  return 6 * seq * parameters + attentionFlops(model);
}

/** Returns the part of `modelFlops` that is scores and sums of attention. */
export function attentionFlops({ layers, heads, head_dim, mla, seq, mtp }: Job["model"]): number {
  const width = mla ? (mla.nope_dim + mla.rope_dim + mla.v_dim) / 2 : head_dim;
  return 6 * seq * seq * (layers + (mtp?.layers ?? 0)) * heads * width;
}
