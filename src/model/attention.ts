/** The attention block of one layer: projections, norms, rotary embedding, attention and output projection. */
import type { Job } from "../../schemas/job.ts";
import { rotatedWidth } from "../../schemas/jobSizes.ts";
import { attention } from "../ops/attention.ts";
import { attentionDocuments, attentionDropoutDocuments } from "../ops/attentionDocuments.ts";
import { attentionDropout } from "../ops/attentionDropout.ts";
import { addBias, gemm } from "../ops/gemm.ts";
import { latentKv, split } from "../ops/latent.ts";
import { type Attrs, declared, type Value } from "../ops/op.ts";
import { rope, ropeDocuments, scalings, unscaled } from "../ops/rope.ts";
import { inStream, type ModuleBuilder, orderOf } from "./builder.ts";
import { headsNormed, normed } from "./norms.ts";

type Model = Job["model"];
type Latent = NonNullable<Model["mla"]>;

/** Builds the attention block: the normalised stream `x` [B,S,D] → the addend of the residual stream [B,S,D]. */
export function attend(module: ModuleBuilder, x: Value): Value {
  const { at, bias } = module;
  const { model: m } = module.job;
  const mixed = m.mla ? latent(module, x, m.mla) : grouped(module, x);
  const out = product(module, "wo", "O@tp,D", mixed);
  if (!m.out_bias) return out;
  // the bias is added after the reduction over tensor ranks, in the layout of the residual stream
  return addBias.of({ x: inStream(module.job, out), bias: bias("bo", "D") }, {}, at("attn.wo_bias"));
}

/** `x` times the weight `name`. */
const product = ({ at, weight }: ModuleBuilder, name: string, dims: string, x: Value): Value =>
  gemm.of({ x, w: weight(name, dims) }, {}, at(`attn.${name}`));

/**
 * Grouped-query attention. C is the head width, M the number of query heads per key/value head. With more tensor ranks than key/value
 * heads, the ranks along the axis `copies` have copies of one head, and each some of the query heads that read it; gradients of the head
 * are summed over the copies.
 */
function grouped(module: ModuleBuilder, x: Value): Value {
  const { at, bias } = module;
  const { model: m } = module.job;
  const C = m.head_dim;
  const projected = (name: "q" | "k" | "v", dim: string): Value => {
    const made = product(module, `w${name}`, `D,${dim}`, x);
    const y = name === "q" ? made : declared(made, { pins: [{ axis: "copies", path: "parallel.tensor" }] });
    return m.qkv_bias ? addBias.of({ x: y, bias: bias(`b${name}`, dim) }, {}, at(`attn.w${name}_bias`)) : y;
  };
  const scaled = (name: string, dim: string, y: Value): Value => {
    const names = { gain: name, id: at(`attn.${name}`) };
    if (m.qk_norm === "none") return y;
    return m.qk_norm === "full" ? normed(module, y, dim, names) : headsNormed(module, y, names);
  };
  const width = rotatedWidth(m);
  const rotated = (name: string, y: Value): Value => (m.positions === "rope" ? rotate(module, name, y, { C, first: 0, width }) : y);
  const q = rotated("q", scaled("q_norm", "Q", projected("q", "Q@tp")));
  const k = rotated("k", scaled("k_norm", "KV", projected("k", "KV@kv")));
  const v = projected("v", "KV@kv");
  const mixed = attentionCore(module, { q, k, v }, { C, W: C, M: m.heads / m.kv_heads, scale: C ** -0.5 });
  return declared(mixed, { sharing: { dim: "G", inner: "M", axis: "copies", within: "tp", path: "parallel.tensor" } });
}

/**
 * Multi-head latent attention (DeepSeek-V2). Keys and values of all heads are projected from one normalised latent; queries may be too.
 * The last `rope_dim` channels of a query or key head are rotated. Those of keys are computed next to the latent and shared by all heads.
 */
function latent(module: ModuleBuilder, x: Value, mla: Latent): Value {
  const { at } = module;
  const { model: m } = module.job;
  const { kv_rank, nope_dim, rope_dim: R, v_dim: W } = mla;
  const C = nope_dim + R;
  const scaled = (name: string, dim: string, y: Value): Value =>
    mla.norm ? normed(module, y, dim, { gain: name, id: at(`attn.${name}`), eps: mla.norm_eps }) : y;
  const rotated = (name: string, y: Value, head: Attrs) => rotate(module, name, y, { width: R, ...head });

  const queries =
    mla.q_rank === null
      ? product(module, "wq", "D,Q@tp", x)
      : product(module, "wq_b", "QL,Q@tp", scaled("q_norm", "QL", product(module, "wq_a", "D,QL", x)));
  const q = rotated("q", queries, { C, first: nope_dim });
  const { a: kept, b: shared } = split.all(
    { x: product(module, "wkv_a", "D,KR", x) },
    { A: kv_rank, R, Y: kv_rank + R },
    at("attn.kv_split"),
  );
  const heads = product(module, "wkv_b", "KL,KU@tp", scaled("kv_norm", "KL", kept));
  const r = rotated("k", shared, { C: R, first: 0 });
  const { k, v } = latentKv.all({ x: heads, r }, { R, W, Y: C, Z: nope_dim + W }, at("attn.kv"));
  return attentionCore(module, { q, k, v }, { C, W, M: 1, scale: C ** -0.5 * scoreGain(m) });
}

/** Attention over the whole sequence. With context_method ring, keys and values are not gathered: they shift around the ring. */
function attentionCore(module: ModuleBuilder, operands: Readonly<Record<"q" | "k" | "v", Value>>, attrs: Attrs): Value {
  const { job } = module;
  const mixed = mix(module, operands, attrs);
  const { context, context_method } = job.parallel;
  if (context === 1 || context_method !== "ring") return mixed;
  return declared(mixed, { ring: { dim: "U", as: "S", path: "parallel.context_method" } });
}

/** Attention by the op that the job's dropout and documents need. */
function mix(
  { job, at, sample, documents, random }: ModuleBuilder,
  operands: Readonly<Record<"q" | "k" | "v", Value>>,
  attrs: Attrs,
): Value {
  const id = at("attn.core");
  const drop = job.model.dropout.attention;
  const within = job.data.documents?.mask ?? false;
  if (drop === 0) {
    const all = { ...attrs, ...orderOf(job) };
    return within ? attentionDocuments.of({ ...operands, documents }, all, id) : attention.of(operands, all, id);
  }
  const all = { ...attrs, drop, ...random("attn.core") };
  return within
    ? attentionDropoutDocuments.of({ ...operands, documents, sample }, all, id)
    : attentionDropout.of({ ...operands, sample }, all, id);
}

/** Rotates queries or keys by their positions in the sequence, or in their documents. `head`: the attributes of a head's channels. */
function rotate({ job, at, documents }: ModuleBuilder, name: string, x: Value, head: Attrs): Value {
  const attrs = { ...rotary(job), ...head };
  const id = at(`attn.${name}_rope`);
  return job.data.documents?.positions ? ropeDocuments.of({ x, documents }, attrs, id) : rope.of({ x }, attrs, id);
}

/** Returns the attributes of `rope` for a model. */
function rotary(job: Job): Attrs {
  const { theta, interleaved, scaling } = job.model.rope;
  const own = { theta, sign: 1, interleaved: Number(interleaved), ...unscaled, ...orderOf(job) };
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

/** YaRN (arXiv 2309.00071): the factor on scores of longer sequences. */
const growth = (factor: number, mscale: number): number => (factor > 1 ? 0.1 * mscale * Math.log(factor) + 1 : 1);

/** YaRN in latent attention: the factor on scores, in addition to the gain of queries and keys. */
function scoreGain({ rope: { scaling } }: Model): number {
  return scaling?.mscale_all_dim ? growth(scaling.factor, scaling.mscale_all_dim) ** 2 : 1;
}
