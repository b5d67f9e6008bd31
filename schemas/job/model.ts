/** The section model: the transformer. */
import { z } from "zod";
import { gatedActivations, isGated, plainActivations } from "../activations.ts";
import { completeMoe, Moe, MoeText } from "./moe.ts";
import { count, factor, MOST_LAYERS, real } from "./numbers.ts";
import { completeRope, Rope, RopeText } from "./rope.ts";

/** The largest number of depths of multi-token prediction: a bound on the size of a plan. */
const MOST_DEPTHS = 64;

const Norm = z.strictObject({
  type: z
    .enum(["rmsnorm", "layernorm"])
    .default("rmsnorm")
    .describe(
      "normalisation before attention, before the feed-forward part and before the head. rmsnorm: x / sqrt(mean(x^2) + eps) x gain; layernorm: the same of x less its mean, plus a bias",
    ),
  eps: real.default(1e-5).describe("added to the mean square under the root"),
  zero_centered: z.boolean().default(false).describe("gains are stored less 1, so that they start at 0 (Megatron's --apply-layernorm-1p)"),
});

const Mla = z.strictObject({
  q_rank: count
    .nullable()
    .default(null)
    .describe("width of the latent that all queries are projected from; null = queries are projected from the residual stream"),
  kv_rank: count.describe("width of the latent that the keys and values of all heads are projected from"),
  nope_dim: count.describe("channels of a query or key head without rotary position embedding"),
  rope_dim: count.describe("channels of a query or key head with rotary position embedding; all key heads share them"),
  v_dim: count.describe("width of one value head"),
  norm: z.boolean().default(true).describe("latents are normalised, as in DeepSeek's models"),
  norm_eps: real
    .default(1e-6)
    .describe("added to the mean square of a latent under the root; independent of norm.eps: DeepSeek's models have 1e-6 here"),
});

const Dropout = z.strictObject({
  attention: real
    .default(0)
    .describe(
      "probability p that an attention weight is set to 0 (the others are multiplied by 1 / (1 - p)), rounded to a multiple of 1/32768; attention kernels are slower with it",
    ),
  hidden: real
    .default(0)
    .describe("the same for each element of the embedding, and of what attention and the feed-forward part add to the residual stream"),
});

const Mtp = z.strictObject({
  layers: count
    .max(MOST_DEPTHS)
    .describe("number of further tokens that are predicted: one layer for each, whose input is the output of the one before"),
  coeff: factor.default(0.1).describe("weight of the mean of these losses, relative to the main loss (DeepSeek-V3: 0.3, then 0.1)"),
});

/** model as written. */
export const ModelText = z.strictObject({
  layers: count.max(MOST_LAYERS).describe("transformer layers"),
  hidden: count.describe("width of the residual stream"),
  ffn: count
    .optional()
    .describe(
      "inner width of the dense feed-forward part; default: 4 x hidden; with a gate 8/3 x hidden, rounded down to a multiple of 64, which has as many parameters",
    ),
  heads: count.describe("query heads"),
  kv_heads: count.optional().describe("key and value heads, each shared by heads / kv_heads query heads; default: heads"),
  head_dim: count.optional().describe("width of one head; default: hidden / heads, or with mla nope_dim + rope_dim"),
  mla: Mla.nullable()
    .default(null)
    .describe(
      "latent attention (DeepSeek): the keys and values of all heads are projected from one narrow vector of a token; null = usual attention",
    ),
  qkv_bias: z.boolean().default(false).describe("queries, keys and values have biases"),
  mlp_bias: z
    .boolean()
    .default(false)
    .describe("the matrices of the dense feed-forward part have biases; those of shared experts have none"),
  out_bias: z.boolean().default(false).describe("the output projection of attention has a bias"),
  vocab: count.describe("ids of the tokenizer; token ids are below it"),
  vocab_multiple: count
    .default(1)
    .describe(
      "the embedding and the head have vocab rows, rounded up to a multiple of this number, which tensor must divide; no id has the added rows, and the loss never gives them a probability (Megatron: make-vocab-size-divisible-by times the tensor size)",
    ),
  seq: count.describe("tokens in one sequence"),
  norm: Norm.prefault({}).describe("normalisation"),
  positions: z
    .enum(["rope", "learned", "none"])
    .default("rope")
    .describe(
      "how attention sees the order of tokens. rope: queries and keys are rotated; learned: a vector for each position is added to the embedding; none: by causality alone. With mla, rope_dim channels are rotated in any case",
    ),
  max_positions: count.optional().describe("positions learned: the positions that have a vector; default: seq"),
  rope: RopeText.prefault({}).describe("rotary position embedding"),
  activation: z
    .enum([...gatedActivations, ...plainActivations])
    .default("swiglu")
    .describe(
      "activation of the feed-forward part and of experts. With a gate: swiglu, silu(gate) x up; geglu, gelu(gate) x up with the tanh approximation of gelu; quick_geglu, gate x sigmoid(1.702 gate) x up. Without: gelu; gelu_tanh, its tanh approximation; squared_relu",
    ),
  tie_embeddings: z.boolean().default(false).describe("the head uses the weights of the embedding"),
  qk_norm: z
    .enum(["none", "head", "full"])
    .default("none")
    .describe("normalisation of queries and keys. head: each head alone; full: all heads together (OLMoE)"),
  dropout: Dropout.prefault({}).describe("probabilities of dropout; the same bits are drawn on any mesh"),
  moe: MoeText.nullable().default(null).describe("mixture of experts in place of the dense feed-forward part; null = dense"),
  mtp: Mtp.nullable()
    .default(null)
    .describe("multi-token prediction (DeepSeek-V3): further layers, of the kind of the last one, that predict later tokens; null = none"),
});

/** model with every default filled in. */
export const Model = ModelText.required({ ffn: true, kv_heads: true, head_dim: true, max_positions: true }).extend({
  rope: Rope,
  moe: Moe.nullable(),
});

/** Fills in defaults that depend on other keys. hidden / heads may be fractional here; a rule reports that. */
export function completeModel(model: z.output<typeof ModelText>): z.output<typeof Model> {
  const { mla } = model;
  const ffn = model.ffn ?? (isGated(model.activation) ? Math.max(64, Math.floor((8 * model.hidden) / 3 / 64) * 64) : 4 * model.hidden);
  return {
    ...model,
    ffn,
    kv_heads: model.kv_heads ?? model.heads,
    head_dim: model.head_dim ?? (mla ? mla.nope_dim + mla.rope_dim : model.hidden / model.heads),
    max_positions: model.max_positions ?? model.seq,
    rope: completeRope(model.rope, model.seq),
    moe: model.moe && completeMoe(model.moe, ffn),
  };
}
