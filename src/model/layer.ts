/** One pre-norm transformer layer: attention, then a dense or mixture-of-experts feed-forward block. */

import { add } from "../ops/gemm.ts";
import type { Value } from "../ops/op.ts";
import { attend } from "./attention.ts";
import { dropped, type ModuleBuilder } from "./builder.ts";
import { experts } from "./experts.ts";
import { dense } from "./feedForward.ts";
import { normed } from "./norms.ts";

/** Builds a layer: [B,S,D] → [B,S,D]. `sparse` selects the mixture of experts. */
export function layer(module: ModuleBuilder, x: Value, sparse: boolean): Value {
  const { at } = module;
  const { moe } = module.job.model;
  const a = normed(module, x, "D", { gain: "norm1", id: at("attn.norm") });
  const attended = add.of({ a: x, b: dropped(module, attend(module, a), "attn.dropout") }, {}, at("attn.residual"));
  const h = normed(module, attended, "D", { gain: "norm2", id: at("mlp.norm") });
  const y = moe && sparse ? experts(module, h, moe) : dense(module, h, "H");
  return add.of({ a: attended, b: dropped(module, y, "mlp.dropout") }, {}, at("mlp.residual"));
}
