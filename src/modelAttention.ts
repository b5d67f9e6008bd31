/** The attention of one layer: queries, keys and values, their norms and positions, and what mixes them. */
import type { Part } from "./modelParts.ts";
import { attention, rope } from "./ops/attention.ts";
import { gemm } from "./ops/linear.ts";
import { headNorm, rmsnorm } from "./ops/norm.ts";
import type { Value } from "./ops/op.ts";

/** `x` normalised [B,S,D] → what is added to the residual stream [B,S,D]. Head width C, M query heads per key/value head. */
export function attend(part: Part, x: Value): Value {
  const { at, weight, gain } = part;
  const { model: m } = part.job;
  const { eps } = m.norm;
  const projected = (name: string, dims: string): Value => gemm.of({ x, w: weight(name, dims) }, {}, at(`attn.${name}`));
  const positioned = (name: string, y: Value): Value =>
    rope.of({ x: y }, { C: m.head_dim, theta: m.rope.theta, sign: 1 }, at(`attn.${name}_rope`));
  const normed = (name: string, dims: string, y: Value): Value =>
    m.qk_norm === "none"
      ? y
      : m.qk_norm === "full"
        ? rmsnorm.of({ x: y, gain: gain(name, dims) }, { eps }, at(`attn.${name}`))
        : headNorm.of({ x: y, gain: gain(name, "C") }, { C: m.head_dim, eps }, at(`attn.${name}`));
  const q = positioned("q", normed("q_norm", "Q", projected("wq", "D,Q@tp")));
  const k = positioned("k", normed("k_norm", "KV", projected("wk", "D,KV@tp")));
  const v = projected("wv", "D,KV@tp");
  const C = m.head_dim;
  const mixed = attention.of(
    { q, k, v },
    { C, W: C, M: m.heads / m.kv_heads, scale: 1 / Math.sqrt(C), chunk: 0, ranks: 1 },
    at("attn.core"),
  );
  return gemm.of({ x: mixed, w: weight("wo", "Q@tp,D") }, {}, at("attn.wo"));
}
