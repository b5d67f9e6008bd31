/**
 * Choice of the forward values that backward recomputes instead of reading stored activations. The plan shows costs and savings:
 * clones of ops (their ids end in `.again`), their collectives, and the memory of activations.
 */
import type { Job } from "../../schemas/job.ts";
import { gatedUnits } from "../ops/gatedUnits.ts";
import type { Node } from "../ops/op.ts";
import { plainUnits } from "../ops/plainUnits.ts";
import type { Pipeline } from "./pipelineStages.ts";

/** Per module, named as in Megatron Core, a pattern for the ids of its nodes within a layer. */
const modules: Readonly<Record<Job["train"]["recompute"]["modules"][number], RegExp>> = {
  core_attn: /^attn\.core$/,
  layernorm: /^(attn|mlp)\.norm$/,
  // projections from latents to heads, and the norms of latents
  mla_up_proj: /^attn\.(q_norm|wq_b|q_rope|kv_norm|wkv_b|k_rope|kv)$/,
  mlp: /^mlp\.(?!norm|residual)/,
  moe: /^moe\./,
  moe_act: new RegExp(`^moe\\.(${[...Object.keys(gatedUnits), ...Object.keys(plainUnits)].join("|")})$`),
  // the rows that experts read: top_k copies of each token
  moe_permute: /^moe\.permute$/,
  shared_experts: /^moe\.shared\./,
};

/** Returns a predicate: whether backward recomputes the outputs of a node. Ops that keep state across microbatches are never recomputed. */
export function isRecomputed({ train, model }: Pick<Job, "train" | "model">, { of }: Pick<Pipeline, "of">): (node: Node) => boolean {
  const { mode, modules: chosen, method, layers: count } = train.recompute;
  if (mode === "none") return () => false;
  const isStateful = ({ op }: Node): boolean => op.inPlace !== undefined;
  const layerNodeOf = ({ id }: Node): { isMtp: boolean; layer: number; name: string } | undefined => {
    const [, kind, layer, name] = /^(layers|mtp)\.(\d+)\.(.*)$/.exec(id) ?? [];
    return name === undefined ? undefined : { isMtp: kind === "mtp", layer: Number(layer), name };
  };
  if (mode === "selective") {
    const patterns = chosen.map((m) => modules[m]);
    return (node) => {
      const at = layerNodeOf(node);
      return at !== undefined && !isStateful(node) && patterns.some((p) => p.test(at.name));
    };
  }
  /** Returns the index of a layer in its chunk, from 0. */
  const indexInChunk = (layer: number): number => 1 + layer - of.findIndex((v, position) => v === of[1 + layer] && position > 0);
  const isRecomputedLayer = (layer: number): boolean => method === "uniform" || indexInChunk(layer) < count;
  // the input of a group of layers is stored: the group is recomputed from it
  const startsGroup = (layer: number): boolean => indexInChunk(layer) === 0 || method === "block" || indexInChunk(layer) % count === 0;
  return (node) => {
    const at = layerNodeOf(node);
    if (at === undefined || isStateful(node)) return false;
    // as in Megatron Core: each layer of multi-token prediction is a group; method `block` does not recompute them
    if (at.isMtp) return method === "uniform" && !/^(embedding|final\.norm|logits|loss.*)$/.test(at.name);
    if (!isRecomputedLayer(at.layer)) return false;
    return at.name !== "mlp.residual" || !(at.layer + 1 >= model.layers || startsGroup(at.layer + 1));
  };
}
