/**
 * Converts the model of a job to a Hugging Face config.json: the inverse of importHf.ts. Each family writes the keys that it has;
 * the caller imports the result again and uses the first family whose config gives the same model.
 */
import { hasExperts } from "../../../schemas/experts.ts";
import type { Job } from "../../../schemas/job.ts";
import type { Config } from "./configReader.ts";

type Model = Job["model"];
type Moe = NonNullable<Model["moe"]>;

/** A config, and how the tensors of its experts are named. */
export interface ExportedConfig {
  readonly family: string;
  readonly config: Config;
  /** The names of routed experts in files that transformers 4, vLLM and llama.cpp read. */
  readonly experts: "mlp.experts" | "block_sparse_moe";
}

/** What a config contains besides the model. */
export interface ConfigSettings {
  /** The dtype of the weights: bfloat16, float16, float32. */
  readonly dtype: string;
  /** The standard deviation of initial weights. */
  readonly initStd: number;
  /** The longest sequence that the model takes. */
  readonly positions: number;
}

/** Keys whose values transformers 5 accepts as floats alone: a whole number is written with a decimal point. */
const floatKeys: ReadonlySet<string> = new Set([
  ...["rms_norm_eps", "rope_theta", "attention_dropout", "initializer_range", "router_aux_loss_coef", "aux_loss_alpha"],
  ...["routed_scaling_factor", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"],
  ...["mscale", "mscale_all_dim", "attention_factor"],
]);

/** Returns the text of config.json. */
export function configText(config: Config): string {
  const marked = (key: string, value: unknown): unknown =>
    floatKeys.has(key) && Number.isInteger(value) ? `float ${(value as number).toFixed(1)}` : value;
  return `${JSON.stringify(config, marked, 2).replace(/"float ([-\d.]+)"/g, "$1")}\n`;
}

type FamilyKeys = (model: Model, moe: Moe | null) => Config;

const architectures: Readonly<Record<string, string>> = {
  llama: "LlamaForCausalLM",
  qwen2: "Qwen2ForCausalLM",
  qwen3: "Qwen3ForCausalLM",
  mixtral: "MixtralForCausalLM",
  olmoe: "OlmoeForCausalLM",
  qwen2_moe: "Qwen2MoeForCausalLM",
  qwen3_moe: "Qwen3MoeForCausalLM",
  deepseek_v3: "DeepseekV3ForCausalLM",
  deepseek_v2: "DeepseekV2ForCausalLM",
};

const attention: FamilyKeys = ({ kv_heads, head_dim, qkv_bias, out_bias }) => ({
  ...{ num_key_value_heads: kv_heads, head_dim, attention_bias: qkv_bias && out_bias },
});
const dense: FamilyKeys = (model, moe) => ({ ...attention(model, moe), intermediate_size: model.ffn });
const noWindow = { use_sliding_window: false, sliding_window: null };

/** The coefficient of the balancing loss of this kind; 0 if there is none. */
function auxOf({ router: { balance, aux_coeff } }: Moe, kinds: readonly string[]): number {
  const all = [balance].flat().map((kind, i): [string, number] => [kind, [aux_coeff].flat()[i] ?? 0]);
  return all.find(([kind]) => kinds.includes(kind))?.[1] ?? 0;
}

const routed = (moe: Moe): Config => ({
  num_experts_per_tok: moe.top_k,
  norm_topk_prob: moe.router.normalize_top_k,
  router_aux_loss_coef: auxOf(moe, ["aux_loss", "seq_aux_loss", "global_aux_loss"]),
  output_router_logits: false,
});

const qwenExperts: FamilyKeys = (model, moe) => {
  if (!moe) return {};
  const withoutExperts = Array.from({ length: model.layers }, (_, i) => i).filter((i) => !hasExperts(model, i));
  return {
    ...{ num_experts: moe.experts, moe_intermediate_size: moe.ffn, ...routed(moe) },
    ...{ decoder_sparse_step: 1, mlp_only_layers: withoutExperts, ...noWindow },
  };
};

const latent =
  (router: (moe: Moe) => Config): FamilyKeys =>
  (model, moe) => {
    const { mla } = model;
    if (!mla || !moe) return {};
    const firstDense = Array.from({ length: model.layers }, (_, i) => hasExperts(model, i)).findIndex((has) => has);
    return {
      ...{ intermediate_size: model.ffn, num_key_value_heads: model.heads, attention_bias: false },
      ...{ q_lora_rank: mla.q_rank, kv_lora_rank: mla.kv_rank },
      ...{ qk_nope_head_dim: mla.nope_dim, qk_rope_head_dim: mla.rope_dim, v_head_dim: mla.v_dim },
      ...{ n_routed_experts: moe.experts, num_experts_per_tok: moe.top_k, moe_intermediate_size: moe.ffn },
      ...{ n_shared_experts: moe.shared ? moe.shared.ffn / moe.ffn : 0, first_k_dense_replace: firstDense, moe_layer_freq: 1 },
      ...{ norm_topk_prob: moe.router.normalize_top_k, routed_scaling_factor: moe.router.scaling },
      ...{ aux_loss_alpha: auxOf(moe, ["aux_loss", "seq_aux_loss"]), seq_aux: [moe.router.balance].flat().includes("seq_aux_loss") },
      ...router(moe),
    };
  };

const families: Readonly<Record<string, FamilyKeys>> = {
  llama: (model, moe) => ({ ...dense(model, moe), mlp_bias: false }),
  qwen2: (model, moe) => ({ ...dense(model, moe), ...noWindow }),
  qwen3: (model, moe) => ({ ...dense(model, moe), ...noWindow }),
  mixtral: (model, moe) => ({
    ...attention(model, moe),
    ...(moe && { ...routed(moe), intermediate_size: moe.ffn, num_local_experts: moe.experts, sliding_window: null }),
  }),
  olmoe: (model, moe) => ({
    ...attention(model, moe),
    ...(moe && { ...routed(moe), intermediate_size: moe.ffn, num_experts: moe.experts, clip_qkv: null }),
  }),
  qwen3_moe: (model, moe) => ({ ...dense(model, moe), ...qwenExperts(model, moe) }),
  qwen2_moe: (model, moe) => ({
    ...dense(model, moe),
    ...qwenExperts(model, moe),
    ...{ qkv_bias: model.qkv_bias, shared_expert_intermediate_size: moe?.shared?.ffn },
  }),
  deepseek_v3: (model, moe) => ({
    ...latent(({ router }) => ({
      ...{ n_group: router.groups, topk_group: router.group_top_k, scoring_func: "sigmoid", topk_method: "noaux_tc" },
    }))(model, moe),
    rope_interleave: model.rope.interleaved,
    ...(model.mtp && { num_nextn_predict_layers: model.mtp.layers }),
  }),
  deepseek_v2: latent(({ router }) => ({
    ...{ n_group: router.groups, topk_group: router.group_top_k, scoring_func: "softmax" },
    topk_method: router.groups > 1 ? "group_limited_greedy" : "greedy",
  })),
};

/** The families that exports write, by model_type. A Mistral model without a window is a Llama model. */
export const exportFamilies: readonly string[] = Object.keys(families);

/** Returns the configs of all families that may describe a model. */
export function hfConfigsOf(model: Model, { dtype, initStd, positions }: ConfigSettings): ExportedConfig[] {
  const { layers, hidden, heads, vocab, norm, tie_embeddings, rope, moe, mla } = model;
  const common = {
    ...{ num_hidden_layers: layers, hidden_size: hidden, num_attention_heads: heads, vocab_size: vocab },
    ...{ max_position_embeddings: positions, rms_norm_eps: norm.eps, tie_word_embeddings: tie_embeddings, hidden_act: "silu" },
    ...{ rope_theta: rope.theta, rope_scaling: scalingOf(rope), attention_dropout: 0, initializer_range: initStd },
    ...{ use_cache: true, torch_dtype: dtype, bos_token_id: null, eos_token_id: null, pad_token_id: null },
  };
  const sparse = (family: string): boolean => /mixtral|moe|deepseek/.test(family);
  return Object.entries(families)
    .filter(([family]) => sparse(family) === (moe !== null) && family.startsWith("deepseek") === (mla !== null))
    .map(([family, keys]) => ({
      family,
      config: { architectures: [architectures[family]], model_type: family, ...common, ...keys(model, moe) },
      experts: family === "mixtral" ? "block_sparse_moe" : "mlp.experts",
    }));
}

/** The keys of RoPE scaling under the names of transformers 4, which transformers 5 reads, too. */
function scalingOf({ scaling }: Model["rope"]): Config | null {
  if (!scaling) return null;
  const { type, factor } = scaling;
  const named = { rope_type: type, type, factor };
  switch (type) {
    case "linear":
      return named;
    case "llama3":
      return {
        ...{ ...named, original_max_position_embeddings: scaling.original_seq },
        ...{ low_freq_factor: scaling.low_freq, high_freq_factor: scaling.high_freq },
      };
    case "yarn":
      return {
        ...{ ...named, original_max_position_embeddings: scaling.original_seq },
        ...{ beta_fast: scaling.beta_fast, beta_slow: scaling.beta_slow },
        ...(scaling.mscale !== null && { mscale: scaling.mscale }),
        ...(scaling.mscale_all_dim !== null && { mscale_all_dim: scaling.mscale_all_dim }),
        ...(scaling.attention_factor !== null && { attention_factor: scaling.attention_factor }),
      };
    default:
      return type satisfies never;
  }
}
