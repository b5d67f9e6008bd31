/**
 * Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2), as in Megatron Core (transformer/multi_token_prediction.py).
 * Depth k reads the output of depth k - 1 and the embedding of the token k places ahead. It normalises both, projects their
 * concatenation [embedding, hidden] to one vector, and applies a layer of the kind of the model's last layer and a final norm. The
 * result goes to the shared head, which predicts token k + 1 ahead, and to depth k + 1. The first depth reads the model's output after
 * its last norm, as in Megatron Core and in speculative decoding with DeepSeek's weights.
 */
import { hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { gemm } from "../ops/gemm.ts";
import { join } from "../ops/latent.ts";
import type { Value } from "../ops/op.ts";
import { embed } from "../ops/vocab.ts";
import { dropped, inStream, type ModuleBuilderAt } from "./builder.ts";
import { layer } from "./layer.ts";
import { normed } from "./norms.ts";
import { depthAt, depthPart } from "./positions.ts";

/** Builds all depths: `y` normalised [B,S,D] → the inputs of the head, first depth first. `table` returns the embedding of a position. */
export function depths(job: Job, y: Value, table: (position: number) => Value, moduleAt: ModuleBuilderAt): Value[] {
  const { model: m } = job;
  const D = m.hidden;
  const outputs: Value[] = [];
  let hidden = y;
  for (let k = 1; k <= depthsOf(m); k++) {
    const module = moduleAt(depthAt(m, k), depthPart(k - 1));
    const { at } = module;
    // the host provides the ids ahead: with context parallelism the next token may be on another rank
    const embedded = embed.of({ ids: module.input({ source: "ids", depth: k }), table: table(module.position) }, {}, at("embedding"));
    const a = normed(module, dropped(module, inStream(job, embedded), "embedding.dropout"), "D", {
      ...{ gain: "enorm", id: at("embedding.norm") },
    });
    const b = normed(module, hidden, "D", { gain: "hnorm", id: at("hidden.norm") });
    const joined = join.of({ a, b }, { A: D, R: D, Y: 2 * D }, at("joined"));
    const x = gemm.of({ x: joined, w: module.weight("proj", "2D,D@tp") }, {}, at("projected"));
    const out = layer(module, inStream(job, x), hasExperts(m, m.layers - 1));
    hidden = normed(module, out, "D", { gain: "norm", id: at("final.norm") });
    outputs.push(hidden);
  }
  return outputs;
}
