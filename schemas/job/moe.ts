/** The section model.moe: mixture of experts. */
import { z } from "zod";
import { count, factor, MOST_LAYERS, real } from "./numbers.ts";

const Balance = z.enum(["none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile"]);
/** The name of a method that balances the load of experts. */
export type Balance = z.infer<typeof Balance>;

const RouterText = z.strictObject({
  type: z
    .enum(["top_k", "expert_choice"])
    .default("top_k")
    .describe(
      "top_k: each token chooses its top_k experts; expert_choice: each expert chooses its best tokens of a microbatch, as many as an even load has",
    ),
  score: z
    .enum(["softmax", "sigmoid", "sqrt_softplus"])
    .default("softmax")
    .describe("function from logits to scores. softmax: over all experts; sigmoid, sqrt_softplus: for each expert alone"),
  normalize_top_k: z
    .boolean()
    .default(true)
    .describe(
      "divide the scores of the chosen experts by their sum (Mixtral does, OLMoE does not); with softmax and true, experts are chosen by logits, otherwise by scores",
    ),
  scaling: real.default(1).describe("factor on the weights of the chosen experts (DeepSeek-V3: 2.5)"),
  bias: z.boolean().default(false).describe("a trained bias is added to the logits; expert_bias is another one, without a gradient"),
  precision: z
    .enum(["model", "fp32"])
    .default("model")
    .describe("type of the logits and their gradients. model: as train.precision; fp32: always fp32"),
  jitter: real
    .nullable()
    .default(null)
    .describe("eps: each element of the router's input is multiplied by a random number between 1 - eps and 1 + eps; null = no noise"),
  groups: count
    .default(1)
    .describe("number of groups of neighbouring experts; the experts of a token belong to group_top_k groups, which bounds its traffic"),
  group_top_k: count.optional().describe("number of groups that a token may use; default: groups"),
  group_scores: count
    .optional()
    .describe(
      "the score of a group is the sum of this many of its largest scores (DeepSeek-V2: 1, V3: 2); default: top_k / group_top_k, rounded down, as in Megatron Core",
    ),
  expert_bias: z
    .boolean()
    .default(false)
    .describe(
      "choose experts by score plus a bias for each expert, which is updated after each step towards even loads (DeepSeek-V3); the weights of the chosen experts ignore the bias",
    ),
  bias_rate: real.default(1e-3).describe("change of an expert's bias in a step"),
  balance: z
    .union([Balance, z.array(Balance).min(1)])
    .default("aux_loss")
    .describe(
      "method or methods that balance the load of experts. aux_loss, seq_aux_loss, global_aux_loss: a loss on the counts of each microbatch, of each sequence, or of all data ranks and the microbatches of the step so far; sinkhorn: Sinkhorn's method on the logits; quantile: biases that are quantiles of the logits",
    ),
  aux_coeff: z
    .union([real, z.array(real)])
    .default(0)
    .describe(
      "weight of the balancing loss; a list for several methods. The default is 0, as in Megatron Core, so that an imported job trains the same; with 0 no loss balances the load, and a rule warns",
    ),
  quantile_ema: real.default(0).describe("balance quantile: fraction of the old bias in the bias after a step"),
  z_coeff: factor
    .default(0)
    .describe("weight of the loss on the squared log-sum-exp of the router's logits, which keeps logits small; 0 = no such loss"),
  force: z
    .enum(["none", "uniform"])
    .default("none")
    .describe("for benchmarks. uniform: experts take tokens in turn, whatever the scores; the scores still give the weights"),
});
const Router = RouterText.required({ group_top_k: true, group_scores: true });

const Capacity = z.strictObject({
  factor: real.describe("rows of an expert, as a multiple of the even share of the tokens that one rank routes at once"),
  drop: z
    .enum(["probs", "position"])
    .default("probs")
    .describe(
      "which rows an expert keeps when it has too many. probs: those with the largest weights; position: those of the first tokens (Megatron Core's position keeps arbitrary ones)",
    ),
  pad: z.boolean().default(false).describe("pad every expert to the same number of rows"),
});

const Shared = z.strictObject({
  ffn: count.describe("total inner width of the shared experts"),
  gate: z
    .boolean()
    .default(false)
    .describe("multiply the output of the shared experts by the sigmoid of the token's product with a vector (Qwen2-MoE)"),
});

const SomeLayers = z.strictObject({
  first_dense: z.int().min(0).default(0).describe("number of dense layers at the beginning (DeepSeek)"),
  every: count.default(1).describe("of the other layers, those whose number (from 0) is a multiple of this have experts"),
});

/** model.moe as written. */
export const MoeText = z.strictObject({
  experts: count.max(65536).describe("experts in each layer"),
  top_k: count.describe("experts that each token is sent to"),
  ffn: count.optional().describe("inner width of one expert; default: model.ffn"),
  bias: z.boolean().default(false).describe("the matrices of routed experts have biases"),
  layers: z
    .union([z.literal("all"), SomeLayers, z.array(z.int().min(0).max(1)).max(MOST_LAYERS)])
    .default("all")
    .describe("which layers have experts; the others are dense, of width model.ffn. A list has 1 or 0 for each layer"),
  shared: Shared.nullable().default(null).describe("shared experts: a dense part that processes every token; null = none"),
  latent: count
    .nullable()
    .default(null)
    .describe(
      "width of the input and output of routed experts: tokens are projected to it before dispatch, and back after; null = model.hidden",
    ),
  router: RouterText.prefault({}).describe("how tokens choose experts"),
  dispatch: z
    .enum(["all_to_all", "once", "once_per_node", "all_gather"])
    .default("all_to_all")
    .describe(
      "how rows reach the ranks of their experts. all_to_all: each row is sent to its experts; once: a token is sent once to each rank that has experts of it, with its weights, and that rank returns one sum; once_per_node: the same, and it crosses the network once to each node that has experts of it, which returns one sum; all_gather: every row is sent to every rank of the expert group",
    ),
  capacity: z
    .union([z.literal("dropless"), Capacity])
    .default("dropless")
    .describe("dropless: experts process all routed rows; a section: a limit, above which rows are dropped"),
  rows_bound: z
    .union([z.literal("worst"), real.min(1)])
    .default("worst")
    .describe(
      "rows that an expert-parallel rank has memory for, as a multiple of the balanced load; worst: the largest number that routing can send, which never overflows",
    ),
});

/** model.moe with every default filled in. */
export const Moe = MoeText.required({ ffn: true }).extend({ router: Router });
type Moe = z.output<typeof Moe>;

/** Fills in defaults that depend on other keys. `ffn`: model.ffn. */
export function completeMoe(moe: z.output<typeof MoeText>, ffn: number): Moe {
  const { router } = moe;
  const groupTopK = router.group_top_k ?? router.groups;
  const groupScores = router.group_scores ?? Math.max(1, Math.floor(moe.top_k / groupTopK));
  return { ...moe, ffn: moe.ffn ?? ffn, router: { ...router, group_top_k: groupTopK, group_scores: groupScores } };
}
