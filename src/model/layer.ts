/** One transformer layer: attention and a feed-forward part, dense or of experts, each normalised before and added after. */

import { add } from "../ops/linear.ts";
import { rmsnorm } from "../ops/norm.ts";
import type { Value } from "../ops/op.ts";
import { attend } from "./attention.ts";
import { dropped, type Part } from "./builder.ts";
import { experts } from "./experts.ts";
import { dense } from "./feedForward.ts";

/** [B,S,D] → [B,S,D]. */
export function layer(part: Part, x: Value, sparse: boolean): Value {
  const { at, gain } = part;
  const { moe, norm } = part.job.model;
  const { eps } = norm;
  const a = rmsnorm.of({ x, gain: gain("norm1", "D") }, { eps }, at("attn.norm"));
  const attended = add.of({ a: x, b: dropped(part, attend(part, a), "attn.dropout") }, {}, at("attn.residual"));
  const h = rmsnorm.of({ x: attended, gain: gain("norm2", "D") }, { eps }, at("mlp.norm"));
  const y = moe && sparse ? experts(part, h, moe) : dense(part, h, "H");
  return add.of({ a: attended, b: dropped(part, y, "mlp.dropout") }, {}, at("mlp.residual"));
}
