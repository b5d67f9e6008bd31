/**
 * The arguments of a Megatron checkpoint as words of a launch. The checkpoint has every argument after validation under the name of
 * Megatron's field; only those that describe the model are used.
 */
import { Trouble } from "../../../schemas/trouble.ts";

/** Fields that become an argument with their value, unless it is None. */
const values = [
  ...["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "seq_length", "max_position_embeddings"],
  ...["normalization", "norm_epsilon", "position_embedding_type", "rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor"],
  ...["mtp_num_layers", "softmax_type"],
  // rankc lacks these: the import refuses them
  ...["activation_func_clamp_value", "window_size", "experimental_attention_variant", "linear_attention_freq"],
];
const ofExperts = [
  ...[
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_group_topk",
  ],
  ...["moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_layer_freq"],
  ...["moe_router_load_balancing_type", "moe_aux_loss_coeff"],
];
const ofLatentAttention = [
  ...["q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_scaling_factor"],
  ...["mscale", "mscale_all_dim", "beta_fast", "beta_slow", "original_max_position_embeddings"],
];
/** Fields that become a flag if they are true. They include features that rankc lacks, so that the import refuses them. */
const flags = [
  ...["swiglu", "squared_relu", "quick_geglu", "openai_gelu", "group_query_attention", "qk_layernorm", "add_qkv_bias"],
  ...["untie_embeddings_and_output_weights", "multi_latent_attention", "use_rope_scaling", "rotary_interleaved", "attention_output_gate"],
  ...["moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_shared_expert_gate"],
];

/** Fields that change how weights are stored, with their effect. Jobs ignore them; a checkpoint with them cannot be read. */
const storage = [
  { field: /^apply_layernorm_1p$/, why: "weights of norms are stored minus 1" },
  { field: /_glu_interleave_size$/, why: "rows of gate and up alternate" },
] as const;

/** Throws a Trouble if weights are stored in a way that the import does not read. */
export function expectPlainStorage(args: ReadonlyMap<unknown, unknown>): void {
  for (const [field, value] of args) {
    const found = storage.find((each) => each.field.test(String(field)));
    if (found && value !== null && value !== false && value !== 0)
      throw new Trouble(`the checkpoint was trained with ${flagOf(String(field))}: ${found.why}`, "save it again without this argument");
  }
}

/** Returns the words that describe the model. `args`: the fields of the saved arguments; lists are arrays, None is null. */
export function wordsOfArguments(args: ReadonlyMap<unknown, unknown>): string[] {
  const has = (field: string): boolean => args.get(field) === true;
  const withExperts = typeof args.get("num_experts") === "number";
  const given = [
    ...values,
    ...(has("group_query_attention") ? ["num_query_groups"] : []),
    ...(withExperts ? ofExperts : []),
    ...(has("multi_latent_attention") ? ofLatentAttention : []),
  ];
  const words = given.flatMap((field) => {
    const value = args.get(field);
    // 0 depths of multi-token prediction and 0 groups mean none
    if (value === undefined || value === null || (field === "mtp_num_layers" && value === 0)) return [];
    return [flagOf(field), Array.isArray(value) ? `[${value.join(",")}]` : String(value)];
  });
  return [
    ...words,
    ...flags.filter(has).map(flagOf),
    ...(args.get("add_bias_linear") === false ? ["--disable-bias-linear"] : []),
    // the importer asks for these; they do not concern the model
    ...["--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-4", "--min-lr", "0", "--bf16"],
  ];
}

const flagOf = (field: string): string => `--${field.replaceAll("_", "-")}`;
