/**
 * Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2), as Megatron Core has it (transformer/multi_token_prediction.py):
 * depth k takes what depth k - 1 made of a token (the model itself, for the first) and the embedding of the token k places ahead,
 * each normalised; a product makes one vector of the two, a layer of the kind of the model's last one follows, and a norm of its own.
 * What that gives goes to the shared head, which predicts the token after the one that was seen, and to depth k + 1. What the first
 * depth takes is the model's output after its last norm, as in Megatron Core and where DeepSeek's weights are used to draft tokens.
 * A token's embedding comes first in the product: so lie the weights of both.
 */
import { hasExperts, type Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { join } from "../ops/latent.ts";
import { gemm } from "../ops/linear.ts";
import { rmsnorm } from "../ops/norm.ts";
import type { Value } from "../ops/op.ts";
import { embed } from "../ops/vocab.ts";
import { depthAt } from "../passes/pipeline.ts";
import { dropped, type ModuleBuilderAt, streamCut } from "./builder.ts";
import { layer } from "./layer.ts";

/** `y` normalised [B,S,D] → what each depth gives the head, the first depth first. `table`: the embedding, where a position finds it. */
export function depths(job: Job, y: Value, table: (position: number) => Value, partAt: ModuleBuilderAt): Value[] {
  const { model: m } = job;
  const { eps } = m.norm;
  const D = m.hidden;
  const made = [y];
  for (let k = 1; k <= depthsOf(m); k++) {
    const module = partAt(depthAt(m, k), `mtp.${k - 1}.`);
    const { at, gain } = module;
    // ids that are ahead are made by the host: on ranks that share a sequence the next token may be another's
    const seen = embed.of({ ids: module.input(`ids_${k}`), table: table(module.position) }, {}, at("embedding"));
    seen.shardAxes = streamCut(job);
    const a = rmsnorm.of({ x: dropped(module, seen, "embedding.dropout"), gain: gain("enorm", "D") }, { eps }, at("embedding.norm"));
    const b = rmsnorm.of({ x: made[k - 1]!, gain: gain("hnorm", "D") }, { eps }, at("hidden.norm"));
    const both = join.of({ a, b }, { A: D, R: D, Y: 2 * D }, at("joined"));
    const x = gemm.of({ x: both, w: module.weight("proj", "2D,D@tp") }, {}, at("projected"));
    x.shardAxes = streamCut(job);
    const out = layer(module, x, hasExperts(m, m.layers - 1));
    made.push(rmsnorm.of({ x: out, gain: gain("norm", "D") }, { eps }, at("final.norm")));
  }
  return made.slice(1);
}
