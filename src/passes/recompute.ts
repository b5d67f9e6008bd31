/**
 * recompute: which values of the forward pass are not kept for backward but made once more there. What it costs and saves
 * stands in the plan: clones of ops (their ids end in `.again`), their collectives, and the memory of the activations.
 */
import type { Job } from "../../schemas/job.ts";
import { gatedUnits } from "../ops/gatedUnits.ts";
import type { Node } from "../ops/op.ts";
import type { Pipeline } from "./pipeline.ts";

/** Modules by the names that Megatron Core gives them; the nodes of a layer that belong to each. */
const modules: Readonly<Record<Job["train"]["recompute"]["modules"][number], RegExp>> = {
  core_attn: /^attn\.core$/,
  layernorm: /^(attn|mlp)\.norm$/,
  // all that heads are made with from latents, and the latents' norms
  mla_up_proj: /^attn\.(q_norm|wq_b|q_rope|kv_norm|wkv_b|k_rope|kv)$/,
  mlp: /^mlp\.(?!norm|residual)/,
  moe: /^moe\./,
  moe_act: new RegExp(`^moe\\.(${Object.keys(gatedUnits).join("|")})$`),
  shared_experts: /^moe\.shared\./,
};

/** Whether backward makes the outputs of a node again. Ops that keep a state across microbatches run once. */
export function isRecomputed({ train, model }: Pick<Job, "train" | "model">, { of }: Pick<Pipeline, "of">): (node: Node) => boolean {
  const { mode, modules: chosen, method, layers: count } = train.recompute;
  if (mode === "none") return () => false;
  const once = ({ op }: Node): boolean => op.inPlace !== undefined;
  const inside = ({ id }: Node): { ahead: boolean; layer: number; name: string } | undefined => {
    const [, kind, layer, name] = /^(layers|mtp)\.(\d+)\.(.*)$/.exec(id) ?? [];
    return name === undefined ? undefined : { ahead: kind === "mtp", layer: Number(layer), name };
  };
  if (mode === "selective") {
    const patterns = chosen.map((m) => modules[m]);
    return (node) => {
      const at = inside(node);
      return at !== undefined && !once(node) && patterns.some((p) => p.test(at.name));
    };
  }
  /** A layer's place in its chunk, from 0. */
  const placeOf = (layer: number): number => 1 + layer - of.findIndex((v, position) => v === of[1 + layer] && position > 0);
  const again = (layer: number): boolean => method === "uniform" || placeOf(layer) < count;
  // what enters a group of layers is kept: all of it comes from there
  const begins = (layer: number): boolean => placeOf(layer) === 0 || method === "block" || placeOf(layer) % count === 0;
  return (node) => {
    const at = inside(node);
    if (at === undefined || once(node)) return false;
    // as in Megatron Core: each layer of multi-token prediction is a group, from what it takes to what it gives; `block` leaves them be
    if (at.ahead) return method === "uniform" && !/^(embedding|final\.norm|logits|loss.*)$/.test(at.name);
    if (!again(at.layer)) return false;
    return at.name !== "mlp.residual" || !(at.layer + 1 >= model.layers || begins(at.layer + 1));
  };
}
