import { readFileSync } from "node:fs";
import fc from "fast-check";
import { expect, test } from "vitest";
import { parse } from "yaml";
import { completeJob, JobText } from "../schemas/job.ts";
import { Trouble } from "../schemas/trouble.ts";
import { importHf, importHfText } from "../src/importHf.ts";
import { readJob } from "../src/readJob.ts";

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
    router: { normalize_top_k: true, aux_coeff: 0 },
  });
  expect(modelOf(config("olmoe-tiny"))).toMatchObject({ kv_heads: 4, qk_norm: "full", tie_embeddings: false, norm: { eps: 1e-5 } });
  expect(modelOf(config("olmoe-tiny")).moe).toMatchObject({ experts: 16, top_k: 4, ffn: 48, router: { normalize_top_k: false } });
});

test("old and new spellings of rope are one; dense families differ where transformers says so", () => {
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

test("everything that is not built here is said at once", () => {
  const wild = {
    ...config("olmoe-tiny"),
    hidden_act: "gelu",
    attention_bias: true,
    clip_qkv: 8,
    sliding_window: 128,
    rope_parameters: { rope_type: "yarn", factor: 4, rope_theta: "big" },
    num_experts: undefined,
    vocab_size: 0.5,
    norm_topk_prob: "yes",
  };
  expect(complaint(wild)).toMatchInlineSnapshot(`
    "this olmoe config cannot be imported:
      vocab_size is 0.5; expected a whole number of 1 or more
      rope of type "yarn" is not supported: positions are rotated unscaled
      rope_theta is "big"; expected a number of 0 or more
      num_experts is missing
      norm_topk_prob is "yes"; expected true or false
      hidden_act "gelu" is not supported: the feed-forward part is silu(gate) x up
      attention_bias true is not supported: linear layers have no bias
      clip_qkv 8 is not supported: queries, keys and values are not clipped
      sliding_window 128 is shorter than a sequence of 512: attention here sees all earlier tokens"
  `);
  expect(complaint({ ...llama, model_type: "gpt2" })).toContain('model_type "gpt2" cannot be imported');
  expect(complaint({ ...llama, rope_scaling: { type: "linear", factor: 2 } })).toContain("linear");
  expect(complaint({ ...llama, num_attention_heads: 33 })).toContain("is not a multiple");
  for (const nothing of [null, 3, "x", [], {}, { model_type: "constructor" }]) complaint(nothing);
});

test("whatever a config holds, it becomes a valid job or a Trouble", () => {
  const base = { ...config("olmoe-tiny"), model_type: "olmoe" };
  fc.assert(
    fc.property(
      fc.constantFrom(...Object.keys(base), "rope_scaling", "head_dim", "sliding_window"),
      fc.oneof(fc.jsonValue(), fc.nat()),
      (key, value) => {
        try {
          JobText.parse(importHf({ ...base, [key]: value }, "a").job);
        } catch (error) {
          expect(error).toBeInstanceOf(Trouble);
        }
      },
    ),
    { numRuns: 500 },
  );
});

test("every imported text passes the check; of 47 billion parameters on one rank it says that they do not fit", () => {
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

test("the text is a job file that says what it assumed", () => {
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
      init_std: 0.02
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
