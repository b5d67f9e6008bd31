/** The attention of one layer: queries, keys and values, their norms and positions, and what mixes them. */
import type { Job } from "../schemas/job.ts";
import type { Part } from "./modelParts.ts";
import { attention } from "./ops/attention.ts";
import { gemm } from "./ops/linear.ts";
import { headNorm, rmsnorm } from "./ops/norm.ts";
import type { Attrs, Value } from "./ops/op.ts";
import { rope, scalings, unscaled } from "./ops/rope.ts";

/** `x` normalised [B,S,D] → what is added to the residual stream [B,S,D]. Head width C, M query heads per key/value head. */
export function attend(part: Part, x: Value): Value {
  const { at, weight, gain } = part;
  const { model: m } = part.job;
  const { eps } = m.norm;
  const projected = (name: string, dims: string): Value => gemm.of({ x, w: weight(name, dims) }, {}, at(`attn.${name}`));
  const positioned = (name: string, y: Value): Value =>
    rope.of({ x: y }, { ...rotary(m), C: m.head_dim, first: 0, width: m.head_dim, sign: 1 }, at(`attn.${name}_rope`));
  const normed = (name: string, dims: string, y: Value): Value =>
    m.qk_norm === "none"
      ? y
      : m.qk_norm === "full"
        ? rmsnorm.of({ x: y, gain: gain(name, dims) }, { eps }, at(`attn.${name}`))
        : headNorm.of({ x: y, gain: gain(name, "C") }, { C: m.head_dim, eps }, at(`attn.${name}`));
  const q = positioned("q", normed("q_norm", "Q", projected("wq", "D,Q@tp")));
  const k = positioned("k", normed("k_norm", "KV", projected("wk", "D,KV@tp")));
  const v = projected("wv", "D,KV@tp");
  const mixed = attention.of(
    { q, k, v },
    { C: m.head_dim, W: m.head_dim, M: m.heads / m.kv_heads, scale: m.head_dim ** -0.5, ...order },
    at("attn.core"),
  );
  return gemm.of({ x: mixed, w: weight("wo", "Q@tp,D") }, {}, at("attn.wo"));
}

/** Tokens lie in the order of their positions. */
const order = { chunk: 0, ranks: 1 };

type Model = Job["model"];

/** What the rotary embedding of a model is like, as attributes of `rope`. */
function rotary({ rope: { theta, interleaved, scaling } }: Model): Attrs {
  const own = { theta, interleaved: Number(interleaved), ...unscaled, ...order };
  if (!scaling) return own;
  const { type, factor, original_seq: original } = scaling;
  const stretched = { ...own, scaling: scalings.indexOf(type), factor };
  switch (type) {
    case "linear":
      return stretched;
    case "llama3":
      return { ...stretched, original, low: scaling.low_freq, high: scaling.high_freq };
    case "yarn": {
      const { mscale, mscale_all_dim: all } = scaling;
      const gain = scaling.attention_factor ?? (mscale && all ? growth(factor, mscale) / growth(factor, all) : growth(factor, 1));
      return { ...stretched, original, low: scaling.beta_slow, high: scaling.beta_fast, gain };
    }
    default:
      return type satisfies never;
  }
}

/** YaRN: by what the scores of longer sequences grow. */
const growth = (factor: number, mscale: number): number => (factor > 1 ? 0.1 * mscale * Math.log(factor) + 1 : 1);
