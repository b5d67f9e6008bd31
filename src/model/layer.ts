/** One pre-norm transformer layer: attention, then a dense or mixture-of-experts feed-forward block. */

import { add } from "../ops/linear.ts";
import { rmsnorm } from "../ops/norm.ts";
import type { Value } from "../ops/op.ts";
import { attend } from "./attention.ts";
import { dropped, type ModuleBuilder } from "./builder.ts";
import { experts } from "./experts.ts";
import { dense } from "./feedForward.ts";

/** Builds a layer: [B,S,D] → [B,S,D]. `sparse` selects the mixture of experts. */
export function layer(module: ModuleBuilder, x: Value, sparse: boolean): Value {
  const { at, gain } = module;
  const { moe, norm } = module.job.model;
  const { eps } = norm;
  const a = rmsnorm.of({ x, gain: gain("norm1", "D") }, { eps }, at("attn.norm"));
  const attended = add.of({ a: x, b: dropped(module, attend(module, a), "attn.dropout") }, {}, at("attn.residual"));
  const h = rmsnorm.of({ x: attended, gain: gain("norm2", "D") }, { eps }, at("mlp.norm"));
  const y = moe && sparse ? experts(module, h, moe) : dense(module, h, "H");
  return add.of({ a: attended, b: dropped(module, y, "mlp.dropout") }, {}, at("mlp.residual"));
}
