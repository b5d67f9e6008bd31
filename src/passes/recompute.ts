/**
 * Choice of the forward values that backward recomputes instead of reading stored activations. The plan shows costs and savings:
 * clones of ops (their ids end in `.again`), their collectives, and the memory of activations.
 */
import type { Job } from "../../schemas/job.ts";
import { depthAt, depthPart, layerAtPosition, layerPart } from "../model/positions.ts";
import { gatedUnits } from "../ops/gatedUnits.ts";
import type { Node } from "../ops/op.ts";
import { ungatedUnits } from "../ops/ungatedUnits.ts";
import type { Pipeline } from "./pipelineStages.ts";

const isOneOf = (names: readonly string[]) => (name: string) => names.includes(name);
const isIn =
  (part: string, except: readonly string[] = []) =>
  (name: string) =>
    name.startsWith(part) && !except.some((other) => name.startsWith(other));
/** Per module, named as in Megatron Core, whether it contains the node of a name within a layer. */
const modules: Readonly<Record<Job["train"]["recompute"]["modules"][number], (name: string) => boolean>> = {
  core_attn: isOneOf(["attn.core"]),
  layernorm: isOneOf(["attn.norm", "mlp.norm"]),
  // projections from latents to heads, and the norms of latents
  mla_up_proj: isOneOf(["q_norm", "wq_b", "q_rope", "kv_norm", "wkv_b", "k_rope", "kv"].map((name) => `attn.${name}`)),
  mlp: isIn("mlp.", ["mlp.norm", "mlp.residual"]),
  moe: isIn("moe."),
  moe_act: isOneOf([...Object.keys(gatedUnits), ...Object.keys(ungatedUnits)].map((name) => `moe.${name}`)),
  // the rows that experts read: top_k copies of each token
  moe_permute: isOneOf(["moe.permute", "moe.permute_ranks", "moe.permute_rows"]),
  shared_experts: isIn("moe.shared."),
};
/** Nodes of a depth of multi-token prediction that are outside its layer. */
const isOutsideLayer = (name: string): boolean => isOneOf(["embedding", "final.norm", "logits"])(name) || name.startsWith("loss");

/** Returns a predicate: whether backward recomputes the outputs of a node. Ops that keep state across microbatches are never recomputed. */
export function isRecomputed({ train, model }: Pick<Job, "train" | "model">, { of }: Pick<Pipeline, "of">): (node: Node) => boolean {
  const { mode, modules: chosen, method, layers: count } = train.recompute;
  if (mode === "none") return () => false;
  const isStateful = ({ op }: Node): boolean => op.inPlace !== undefined;
  /** Returns the layer of a node and its name within the layer; undefined outside the layers. `layer` is undefined for multi-token prediction. */
  const layerNodeOf = ({ id, position }: Node): { layer: number | undefined; name: string } | undefined => {
    const layer = layerAtPosition(model, position);
    const part = layer === undefined ? depthPart(position - depthAt(model, 1)) : layerPart(layer);
    return id.startsWith(part) ? { layer, name: id.slice(part.length) } : undefined;
  };
  if (mode === "selective") {
    const contained = chosen.map((m) => modules[m]);
    return (node) => {
      const at = layerNodeOf(node);
      return at !== undefined && !isStateful(node) && contained.some((contains) => contains(at.name));
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
    const { layer, name } = at;
    if (layer === undefined) return method === "uniform" && !isOutsideLayer(name);
    if (!isRecomputedLayer(layer)) return false;
    return name !== "mlp.residual" || !(layer + 1 >= model.layers || startsGroup(layer + 1));
  };
}
