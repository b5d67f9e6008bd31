import { readFileSync } from "node:fs";
import fc from "fast-check";
import { expect, test } from "vitest";
import { parse } from "yaml";
import { completeJob, JobText } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { importHf, importHfText } from "../../src/convert/hf/importHf.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";

const config = (name: string): Record<string, unknown> => JSON.parse(readFileSync(`test/fixtures/hf/${name}/config.json`, "utf8"));
const modelOf = (value: unknown) => completeJob(JobText.parse(importHf(value, "a").job)).model;
function complaint(value: unknown): string {
  try {
    importHf(value, "a");
  } catch (error) {
    expect(error).toBeInstanceOf(Trouble);
    return (error as Trouble).message;
  }
  throw new Error("it was imported");
}

const llama = {
  model_type: "llama",
  hidden_size: 2048,
  intermediate_size: 8192,
  num_attention_heads: 32,
  num_key_value_heads: 8,
  num_hidden_layers: 16,
  vocab_size: 128256,
  max_position_embeddings: 8192,
  rms_norm_eps: 1e-5,
  rope_theta: 500000,
  rope_scaling: null,
  tie_word_embeddings: true,
  hidden_act: "silu",
};

test("the fixtures' configs are the models they are", () => {
  expect(modelOf(config("mixtral-tiny"))).toMatchObject({
    layers: 2,
    hidden: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    vocab: 256,
    seq: 512,
    qk_norm: "none",
    rope: { theta: 1e6 },
  });
  expect(modelOf(config("mixtral-tiny")).moe).toMatchObject({
    experts: 8,
    top_k: 2,
    ffn: 96,
    router: { normalize_top_k: true, aux_coeff: 0, precision: "model" },
  });
  expect(modelOf(config("olmoe-tiny"))).toMatchObject({ kv_heads: 4, qk_norm: "full", tie_embeddings: false, norm: { eps: 1e-5 } });
  expect(modelOf(config("olmoe-tiny")).moe).toMatchObject({ experts: 16, top_k: 4, ffn: 48, router: { normalize_top_k: false } });
});

test("old and new keys of RoPE give one job; dense families differ as in transformers", () => {
  const { rope_theta, rope_scaling, ...rest } = llama;
  const renewed = { ...rest, rope_parameters: { rope_type: "default", rope_theta } };
  expect(rope_scaling).toBe(null);
  expect(modelOf(renewed)).toEqual(modelOf(llama));
  expect(modelOf(llama)).toMatchObject({ head_dim: 64, rope: { theta: 500000 }, tie_embeddings: true, moe: null, seq: 4096 });
  expect(modelOf({ ...rest, model_type: "qwen3" })).toMatchObject({ head_dim: 128, qk_norm: "head", rope: { theta: 1e4 } });
  expect(modelOf({ ...llama, model_type: "qwen3", sliding_window: 64, use_sliding_window: false }).qk_norm).toBe("head");
  expect(modelOf({ ...llama, model_type: "mistral", sliding_window: 4096 }).seq).toBe(4096);
  expect(modelOf({ ...rest, num_key_value_heads: null }).kv_heads).toBe(32);
});

test("all unsupported features are reported together", () => {
  const wild = {
    ...config("olmoe-tiny"),
    hidden_act: "gelu",
    attention_bias: true,
    clip_qkv: 8,
    sliding_window: 128,
    rope_parameters: { rope_type: "longrope", factor: 4, rope_theta: "big" },
    num_experts: undefined,
    vocab_size: 0.5,
    norm_topk_prob: "yes",
  };
  expect(complaint(wild)).toMatchInlineSnapshot(`
    "this olmoe config cannot be imported:
      vocab_size is 0.5; expected a whole number of 1 or more
      rope_theta is "big"; expected a number of 0 or more
      rope of type "longrope" is not supported: wavelengths are stretched by linear, llama3 or yarn
      num_experts is missing
      norm_topk_prob is "yes"; expected true or false
      hidden_act "gelu" is not supported: the feed-forward part is silu(gate) x up
      clip_qkv 8 is not supported: queries, keys and values are not clipped
      sliding_window 128 is shorter than a sequence of 512: attention here covers all earlier tokens"
  `);
  expect(complaint({ ...llama, model_type: "gpt2" })).toContain('model_type "gpt2" cannot be imported');
  expect(complaint({ ...llama, rope_scaling: { type: "yarn", factor: 2, truncate: false } })).toContain("truncate");
  expect(complaint({ ...llama, num_attention_heads: 33 })).toContain("is not a multiple");
  for (const nothing of [null, 3, "x", [], {}, { model_type: "constructor" }]) complaint(nothing);
});

// as their owners publish them, without keys that do not describe the model
const qwen3Moe = {
  ...{ model_type: "qwen3_moe", hidden_size: 2048, intermediate_size: 6144, num_hidden_layers: 48, vocab_size: 151936, head_dim: 128 },
  ...{ num_attention_heads: 32, num_key_value_heads: 4, max_position_embeddings: 40960, rope_theta: 1e6, rms_norm_eps: 1e-6 },
  ...{ num_experts: 128, num_experts_per_tok: 8, moe_intermediate_size: 768, norm_topk_prob: true, router_aux_loss_coef: 0.001 },
  ...{ mlp_only_layers: [], decoder_sparse_step: 1, attention_bias: false, sliding_window: null, use_sliding_window: false },
};
const qwen2Moe = {
  ...{ model_type: "qwen2_moe", hidden_size: 3584, intermediate_size: 18944, num_hidden_layers: 28, vocab_size: 151936 },
  ...{ num_attention_heads: 28, num_key_value_heads: 4, max_position_embeddings: 131072, rope_theta: 1e6, rms_norm_eps: 1e-6 },
  ...{ num_experts: 64, num_experts_per_tok: 8, moe_intermediate_size: 2560, shared_expert_intermediate_size: 20480 },
  ...{ norm_topk_prob: false, router_aux_loss_coef: 0.001, sliding_window: 65536, use_sliding_window: false, decoder_sparse_step: 1 },
};
const deepseekV3 = {
  ...{ model_type: "deepseek_v3", hidden_size: 7168, intermediate_size: 18432, num_hidden_layers: 61, vocab_size: 129280 },
  ...{ num_attention_heads: 128, num_key_value_heads: 128, max_position_embeddings: 163840, rope_theta: 10000, rms_norm_eps: 1e-6 },
  ...{ q_lora_rank: 1536, kv_lora_rank: 512, qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128, attention_bias: false },
  ...{ n_routed_experts: 256, num_experts_per_tok: 8, moe_intermediate_size: 2048, n_shared_experts: 1, first_k_dense_replace: 3 },
  ...{ n_group: 8, topk_group: 4, norm_topk_prob: true, routed_scaling_factor: 2.5, scoring_func: "sigmoid", topk_method: "noaux_tc" },
  ...{ moe_layer_freq: 1, num_nextn_predict_layers: 1, tie_word_embeddings: false, hidden_act: "silu" },
  rope_scaling: {
    ...{ type: "yarn", factor: 40, beta_fast: 32, beta_slow: 1, mscale: 1, mscale_all_dim: 1 },
    original_max_position_embeddings: 4096,
  },
};
const deepseekV2Lite = {
  ...deepseekV3,
  ...{ model_type: "deepseek_v2", hidden_size: 2048, intermediate_size: 10944, num_hidden_layers: 27, vocab_size: 102400 },
  ...{ num_attention_heads: 16, num_key_value_heads: 16, q_lora_rank: null, n_routed_experts: 64, num_experts_per_tok: 6 },
  ...{ moe_intermediate_size: 1408, n_shared_experts: 2, first_k_dense_replace: 1, n_group: 1, topk_group: 1, norm_topk_prob: false },
  ...{ routed_scaling_factor: 1, scoring_func: "softmax", topk_method: "greedy", num_nextn_predict_layers: undefined },
};

test("Qwen: biases, head norms, experts beside dense layers, a gated shared one", () => {
  expect(modelOf(qwen3Moe)).toMatchObject({
    ...{ head_dim: 128, kv_heads: 4, qk_norm: "head", qkv_bias: false, out_bias: false, ffn: 6144 },
    moe: {
      experts: 128,
      top_k: 8,
      ffn: 768,
      shared: null,
      layers: "all",
      router: { score: "softmax", normalize_top_k: true, aux_coeff: 0.001 },
    },
  });
  // transformers 5 writes another name
  const renamed = { ...qwen3Moe, num_experts: undefined, num_local_experts: 128 };
  expect(modelOf(renamed)).toEqual(modelOf(qwen3Moe));
  const mixed = modelOf({ ...qwen3Moe, num_hidden_layers: 6, decoder_sparse_step: 2, mlp_only_layers: [3] });
  expect(mixed.moe?.layers).toEqual([0, 1, 0, 0, 0, 1]);
  expect(modelOf({ ...qwen3Moe, attention_bias: true })).toMatchObject({ qkv_bias: true, out_bias: true });

  expect(modelOf(qwen2Moe)).toMatchObject({
    ...{ head_dim: 128, qkv_bias: true, out_bias: false, qk_norm: "none" },
    moe: { experts: 64, ffn: 2560, shared: { ffn: 20480, gate: true }, router: { normalize_top_k: false } },
  });
  expect(modelOf({ ...qwen2Moe, qkv_bias: false }).qkv_bias).toBe(false);
  const dense = { ...qwen2Moe, model_type: "qwen2", num_experts: undefined, num_experts_per_tok: undefined };
  expect(modelOf(dense)).toMatchObject({ qkv_bias: true, out_bias: false, moe: null });
  // only where it is asked for does a window count
  expect(complaint({ ...dense, use_sliding_window: true, sliding_window: 64 })).toContain("sliding_window 64");
});

test("DeepSeek: latent attention, YaRN, experts in groups, shared ones, dense layers first", () => {
  expect(modelOf(deepseekV3)).toMatchObject({
    ...{ kv_heads: 128, head_dim: 192, qk_norm: "none", norm: { eps: 1e-6 } },
    mla: { q_rank: 1536, kv_rank: 512, nope_dim: 128, rope_dim: 64, v_dim: 128, norm_eps: 1e-6 },
    rope: {
      ...{ theta: 1e4, interleaved: true },
      scaling: {
        type: "yarn",
        factor: 40,
        original_seq: 4096,
        beta_fast: 32,
        beta_slow: 1,
        mscale: 1,
        mscale_all_dim: 1,
        attention_factor: null,
      },
    },
    moe: {
      ...{ experts: 256, top_k: 8, ffn: 2048, shared: { ffn: 2048, gate: false }, layers: { first_dense: 3 } },
      router: {
        ...{ score: "sigmoid", normalize_top_k: true, scaling: 2.5, precision: "fp32", groups: 8, group_top_k: 4, group_scores: 2 },
        ...{ expert_bias: true, balance: "none" },
      },
    },
  });
  expect(importHf(deepseekV3, "v3").notes.join(" ")).toMatch(/bias_rate.*further layers \(1\)/);
  expect(modelOf({ ...deepseekV3, rope_interleave: false, q_lora_rank: undefined })).toMatchObject({
    rope: { interleaved: false },
    mla: { q_rank: 1536 },
  });
  expect(modelOf(deepseekV2Lite)).toMatchObject({
    mla: { q_rank: null },
    rope: { interleaved: true },
    moe: {
      ...{ ffn: 1408, shared: { ffn: 2816 }, layers: { first_dense: 1 } },
      router: { score: "softmax", normalize_top_k: false, scaling: 1, groups: 1, expert_bias: false, precision: "fp32" },
    },
  });
  const grouped = { ...deepseekV2Lite, topk_method: "group_limited_greedy", n_group: 8, topk_group: 3, routed_scaling_factor: 16 };
  expect(modelOf(grouped).moe?.router).toMatchObject({ groups: 8, group_top_k: 3, group_scores: 1, scaling: 16 });
  const wild = {
    ...deepseekV2Lite,
    norm_topk_prob: true,
    topk_method: "sampled",
    moe_layer_freq: 2,
    num_key_value_heads: 4,
    attention_bias: true,
  };
  expect(complaint(wild)).toMatchInlineSnapshot(`
    "this deepseek_v2 config cannot be imported:
      topk_method "sampled" is not supported: greedy or group_limited_greedy
      num_key_value_heads 4 is not supported: each of the 16 heads has its own keys and values
      attention_bias true is not supported: these layers have no biases
      norm_topk_prob true is not supported: transformers leaves it out, while DeepSeek's own code normalises and drops routed_scaling_factor
      moe_layer_freq 2 is not supported: all layers after first_k_dense_replace have experts"
  `);
});

test("wavelengths that are stretched are those of transformers, under the old name and the new one", () => {
  const { rope_scaling, rope_theta, ...rest } = llama;
  expect(rope_scaling).toBe(null);
  const llama3 = { rope_type: "llama3", factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 8192 };
  const scaled = modelOf({ ...llama, max_position_embeddings: 131072, rope_scaling: llama3 }).rope;
  expect(scaled).toMatchObject({ theta: 500000, scaling: { type: "llama3", factor: 8, low_freq: 1, high_freq: 4, original_seq: 8192 } });
  expect(modelOf({ ...rest, max_position_embeddings: 131072, rope_parameters: { ...llama3, rope_theta } }).rope).toEqual(scaled);
  expect(modelOf({ ...llama, rope_scaling: { type: "linear", factor: 2 } }).rope.scaling).toMatchObject({ type: "linear", factor: 2 });
  // without a factor, that of the lengths; zeros and nulls count as not given
  const bare = { type: "yarn", factor: null, beta_fast: 0, mscale: 0, original_max_position_embeddings: 2048 };
  expect(modelOf({ ...llama, rope_scaling: bare }).rope.scaling).toMatchObject({
    factor: 4,
    beta_fast: 32,
    mscale: null,
    original_seq: 2048,
  });
});

test("the import of GPT-OSS lists every unsupported feature", () => {
  const gptOss = {
    ...{ model_type: "gpt_oss", hidden_size: 2880, intermediate_size: 2880, num_hidden_layers: 24, vocab_size: 201088, head_dim: 64 },
    ...{ num_attention_heads: 64, num_key_value_heads: 8, num_local_experts: 32, num_experts_per_tok: 4, sliding_window: 128 },
    ...{ max_position_embeddings: 131072, rope_theta: 150000, swiglu_limit: 7, attention_bias: true, hidden_act: "silu" },
    rope_scaling: { rope_type: "yarn", factor: 32, beta_fast: 32, beta_slow: 1, truncate: false, original_max_position_embeddings: 4096 },
    quantization_config: { quant_method: "mxfp4" },
  };
  expect(complaint(gptOss)).toMatchInlineSnapshot(`
    "this gpt_oss config cannot be imported:
      rope truncate false is not supported: the pairs between which scaling sets in are whole numbers
      sliding_window 128 is shorter than a sequence of 4096: attention here covers all earlier tokens
      self_attn.sinks are not supported: softmax here is over the keys alone
      swiglu_limit is not supported: gate and up are not clamped, and silu has no other slope
      mlp.experts.gate_up_proj_bias and down_proj_bias are not supported: experts have no biases
      mlp.router.bias is not supported: the router has no bias"
  `);
});

test("whatever a config holds, it becomes a valid job or a Trouble", () => {
  const all = [{ ...config("olmoe-tiny"), model_type: "olmoe" }, llama, qwen2Moe, qwen3Moe, deepseekV2Lite, deepseekV3];
  const keys = [...new Set(all.flatMap((c) => Object.keys(c))), "head_dim", "qkv_bias", "rope_interleave"];
  fc.assert(
    fc.property(
      fc.constantFrom(...all),
      fc.constantFrom(...keys),
      fc.oneof(fc.jsonValue(), fc.nat(), fc.record({ type: fc.constantFrom("yarn", "llama3"), factor: fc.jsonValue() })),
      (base, key, value) => {
        try {
          JobText.parse(importHf({ ...base, [key]: value }, "a").job);
        } catch (error) {
          expect(error).toBeInstanceOf(Trouble);
        }
      },
    ),
    { numRuns: 1000 },
  );
});

test("every imported job passes check, except that 47 billion parameters do not fit one rank", () => {
  const large = {
    ...config("mixtral-tiny"),
    hidden_size: 4096,
    intermediate_size: 14336,
    num_hidden_layers: 32,
    router_aux_loss_coef: 0.02,
  };
  const codes = (value: unknown) => readJob(importHfText(value, "a"), "job.yaml").findings.map((f) => f.code);
  for (const value of [config("mixtral-tiny"), config("olmoe-tiny"), llama]) expect(codes(value)).toEqual([]);
  expect(codes(large)).toEqual(["C510"]);
});

test("the text is a job file with its assumptions as comments", () => {
  const text = importHfText(llama, "llama-1b");
  expect(parse(text)).toEqual(importHf(llama, "llama-1b").job);
  expect(text).toMatchInlineSnapshot(`
    "# llama-1b: the model is that of the Hugging Face config; parallel, train, data and cluster are a start, to be set.
    # model.seq: the model takes up to 8192 tokens; training starts with 4096.
    # data: the text is read as bytes, of which a vocabulary of 128256 uses the first 256 ids.

    name: llama-1b
    model:
      layers: 16
      hidden: 2048
      ffn: 8192
      heads: 32
      kv_heads: 8
      head_dim: 64
      vocab: 128256
      seq: 4096
      norm:
        type: rmsnorm
        eps: 0.00001
      rope:
        theta: 500000
      activation: swiglu
      tie_embeddings: true
      qk_norm: none
      moe: null
    parallel:
      world: 1
    train:
      micro_batch: 1
      global_batch: 8
      steps: 1000
      precision: bf16
      init:
        std: 0.02
      optimizer:
        type: adamw
        lr: 0.0003
        min_lr: 0.00003
        warmup_steps: 100
        decay_steps: 1000
        schedule: cosine
    data:
      path: corpus.txt
      tokenizer: bytes
    cluster:
      nodes: 1
      gpus_per_node: 1
      device: a100-80gb
    "
  `);
});
