/** Public recipes of Megatron: what their arguments become. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { parameterCount } from "../../src/analysis/parameterCount.ts";
import type { ImportedJob } from "../../src/convert/importedJob.ts";
import { importMegatron, type MegatronSettings } from "../../src/convert/megatron/importMegatron.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { problemsOf } from "../support/importProblems.ts";
import { fixture } from "../support/job.ts";
import { complete } from "../support/megatronImport.ts";

describe("public recipes", () => {
  const file = (name: string) => ({ text: readFileSync(fixture(`megatron/${name}`), "utf8"), file: name });
  const script = (name: string, settings: Partial<MegatronSettings> = {}): ImportedJob =>
    importMegatron({ kind: "script", ...file(name) }, { name: "a", ...settings });
  /** A list of the model zoo with the degrees tp, pp, ep and the batch. */
  const list = (
    name: string,
    world: number,
    sizes: readonly [number, number, number, number],
    words: string,
    more: Record<string, string> = {},
  ) => {
    const [TP, PP, EP, GBS] = sizes.map(String);
    const given = { TP, PP, EP, GBS, CP: "1", MBS: "1", SEQ_LEN: "4096", LAYERS_PER_VP: "false", ...more };
    const variables = new Map(Object.entries(given).flatMap(([key, value]) => (value === undefined ? [] : [[key, value] as const])));
    return importMegatron(
      { kind: "list", ...file(`${name}.yaml`) },
      { name: "a", world, variables, words: words.split(" ").filter((w) => w !== "") },
    );
  };
  const alltoall = "--moe-token-dispatcher-type alltoall";
  const selective = (...modules: string[]) => `--recompute-granularity selective --recompute-modules ${modules.join(" ")}`;
  const mtp = "--mtp-num-layers 1 --mtp-loss-scaling-factor 0.1 --moe-token-dispatcher-type flex";
  /** Of few layers the memory is found quickly. */
  const errorsOf = ({ text }: ImportedJob): readonly string[] =>
    readJob(text, "job.yaml")
      .findings.filter(({ level }) => level === "error")
      .map(({ code }) => code);

  test("Megatron's Mixtral 8x7B script imports unchanged: its default of one node is too small, so the job has two", () => {
    const result = script("mixtral_8x7b_16gpu.sh");
    const job = complete(result);
    expect(result.notes[0]).toContain("NNODES is 2: with the script's default of 1 there are 8 ranks");
    expect(job.parallel).toMatchObject({ world: 16, tensor: 4, sequence: true, expert: 4, expert_tensor: 4, data: 4 });
    expect(job.model).toMatchObject({
      vocab: 32000,
      vocab_multiple: 512,
      kv_heads: 8,
      moe: { dispatch: "all_gather", router: { aux_coeff: 0.01 } },
    });
    expect(job.train.optimizer).toMatchObject({ betas: [0.9, 0.999], decay_steps: 320000, warmup_steps: 500 });
    expect(result.mapped).toHaveLength(41);
    expect(job.train.evaluation).toEqual({ every: 1000, steps: 10, at_end: true });
    expect(complete(script("mixtral_8x7b_16gpu.sh", { world: 32 })).parallel).toMatchObject({ world: 32, data: 8 });
    expect(complete(script("mixtral_8x7b_16gpu.sh", { variables: new Map([["NNODES", "4"]]) })).parallel.world).toBe(32);
  });

  test("the job contains only values that differ from rankc", () => {
    expect(script("mixtral_8x7b_16gpu.sh").text).toMatchInlineSnapshot(`
      "# yaml-language-server: $schema=schemas/job.schema.json
      # NNODES is 2: with the script's default of 1 there are 8 ranks, and the degrees need a multiple of 16.
      name: a

      model:
        layers: 32 # --num-layers
        hidden: 4096 # --hidden-size
        ffn: 14336 # --ffn-hidden-size
        heads: 32 # --num-attention-heads
        kv_heads: 8 # --group-query-attention --num-query-groups
        vocab: 32000 # --tokenizer-type --tokenizer-model: of Llama2Tokenizer
        vocab_multiple: 512 # Megatron's default: 128 times the tensor size 4
        seq: 2048 # --seq-length
        moe:
          experts: 8 # --num-experts
          top_k: 2 # --moe-router-topk
          router:
            aux_coeff: 0.01 # --moe-aux-loss-coeff
          dispatch: all_gather # Megatron's default

      parallel:
        world: 16 # torchrun
        tensor: 4 # --tensor-model-parallel-size
        sequence: true # --sequence-parallel
        expert: 4 # --expert-model-parallel-size
        expert_tensor: 4 # --tensor-model-parallel-size: Megatron takes the tensor degree
        distributed_optimizer: true # --use-distributed-optimizer

      train:
        global_batch: 128 # --global-batch-size
        steps: 500000 # --train-iters
        init:
          std: 0.01 # --init-method-std
          output_scaling: depth # Megatron's default
        optimizer:
          lr: 1.0e-4 # --lr
          min_lr: 1.0e-5 # --min-lr
          betas: [0.9, 0.999] # Megatron's default
          schedule: cosine # --lr-decay-style
          decay_steps: 320000 # --lr-decay-iters
          warmup_steps: 500 # --lr-warmup-iters
        evaluation: {every: 1000, steps: 10} # --eval-interval --eval-iters

      data:
        path: tokens.bin # --data-path: $3, to be set to a file of token ids
        order: shuffled # Megatron's default
        split: [99990, 8, 2] # --split
      "
    `);
  });

  test("Qwen3-30B-A3B", () => {
    const result = list("Qwen3-30B-A3B", 32, [1, 1, 8, 256], "", { MOE_TOKEN_DISPATCHER: "alltoall", MOE_GROUPED_GEMM: "true" });
    const { model, train, parallel } = complete(result);
    expect(model).toMatchObject({
      ...{ vocab: 151669, vocab_multiple: 1187 },
      head_dim: 128,
      kv_heads: 4,
      qk_norm: "head",
      norm: { eps: 1e-6 },
      rope: { theta: 1e6, scaling: null },
    });
    expect(model.moe).toMatchObject({
      experts: 128,
      top_k: 8,
      ffn: 768,
      dispatch: "all_to_all",
      router: { precision: "fp32", normalize_top_k: true },
    });
    expect(train).toMatchObject({ steps: 1049041, optimizer: { warmup_steps: 635.78515625, betas: [0.9, 0.95] } });
    expect(parallel).toMatchObject({ expert: 8, expert_tensor: 1, sequence: false, data: 32 });
    expect(errorsOf(result)).toEqual([]);
  });

  test("Qwen3-235B-A22B: embedding and loss count as layers", () => {
    const result = list("Qwen3-235B-A22B", 256, [2, 8, 32, 2048], `${alltoall} ${selective("moe_act", "layernorm")}`, {
      LAYERS_PER_VP: "3",
    });
    const { model, parallel } = complete(result);
    expect(model).toMatchObject({ layers: 94, vocab: 151669, vocab_multiple: 2374, head_dim: 128 });
    expect(parallel).toMatchObject({ virtual_pipeline: 4, layout: "Ett|(ttt|)*30ttL", data: 16, expert_tensor: 1 });
  });

  test.each([
    [1024, [2, 8, 64, 8192], "Et|(tt|)*30mL", { virtual_pipeline: 4, data: 64 }],
    [256, [1, 8, 32, 8192], "Et*2|(tt|)*22t|(tt|)*7mL", { virtual_pipeline: 4, data: 32 }],
  ] as const)("DeepSeek-V3 on %i ranks", (world, sizes, layout, expected) => {
    const words = `${selective("mla_up_proj", "mlp")} ${mtp} --pipeline-model-parallel-layout ${layout}`;
    const result = list("DeepSeek-V3", world, sizes, words);
    const { model, parallel } = complete(result);
    expect(model).toMatchObject({ vocab: 128815, mtp: { layers: 1 }, mla: { q_rank: 1536, kv_rank: 512, norm_eps: 1e-6 } });
    expect(model.rope.scaling).toMatchObject({ type: "yarn", factor: 40, original_seq: 4096, mscale: 1, mscale_all_dim: 1 });
    expect(model.moe).toMatchObject({ layers: { first_dense: 3 }, shared: { ffn: 2048 }, dispatch: "once_per_node" });
    expect(model.moe?.router).toMatchObject({
      score: "sigmoid",
      groups: 8,
      group_top_k: 4,
      group_scores: 2,
      scaling: 2.5,
      expert_bias: true,
    });
    expect(parallel).toMatchObject({ ...expected, layout });
  });

  test("Mixtral 8x22B", () => {
    const { model, parallel } = complete(list("Mixtral-8x22B", 128, [2, 8, 8, 256], alltoall));
    expect(model).toMatchObject({ layers: 56, vocab: 32000, moe: { experts: 8, top_k: 2, ffn: 16384 } });
    expect(parallel).toMatchObject({ sequence: true, expert_tensor: 1, data: 8 });
  });

  test("--tp-comm-overlap becomes parts of products, as many as Transformer Engine's default", () => {
    const { parallel } = complete(list("Mixtral-8x22B", 128, [2, 8, 8, 256], `${alltoall} --tp-comm-overlap`));
    expect(parallel).toMatchObject({ tensor: 2, sequence: true, tensor_overlap: 4 });
  });

  test("Moonlight in a script with positional words, strings of flags and eval", () => {
    const words = "dsw A3B 1 512 1e-4 1e-5 4096 bf16 1 1 8 true sel /data/x_text_document 100000000000 1000000000".split(" ");
    const result = script("moonlight.sh", { words, vocab: 163840 });
    const { model, parallel, train, data } = complete(result);
    expect(model).toMatchObject({ vocab: 163840, rope: { theta: 50000, scaling: null }, mla: { q_rank: null, kv_rank: 512 } });
    expect(model.moe).toMatchObject({
      layers: { first_dense: 1 },
      shared: { ffn: 2816 },
      router: { scaling: 2.446, balance: "seq_aux_loss" },
    });
    expect(parallel).toMatchObject({ world: 8, tensor: 1, expert: 8, distributed_optimizer: true });
    expect(train).toMatchObject({ steps: 47683, recompute: { mode: "selective" }, optimizer: { warmup_steps: 476 } });
    expect(data).toMatchObject({ sources: [{ path: "/data/x_text_document", weight: 1 }], split: [99, 1, 0] });
    expect(errorsOf(result)).toEqual([]);
    const fp8 = words.with(7, "fp8");
    expect(problemsOf(() => script("moonlight.sh", { words: fp8, vocab: 163840 }))).toEqual([
      expect.stringContaining("--fp8-format hybrid"),
    ]);
  });

  test("without its words, the values of a script are asked for by line", () => {
    const problems = problemsOf(() => script("moonlight.sh"));
    expect(problems).toContainEqual(
      "line 19: --lr $5: $5 is a word after the script's name, and it is not given; give the script's words after --, or --set LR=VALUE",
    );
    expect(problems).toContainEqual(
      "line 14: nodes $NNODES: NNODES is not set; --world N gives the number of ranks, or --set NNODES=VALUE",
    );
  });

  test("Llama 3 8B counts in samples, and features that rankc lacks are named", () => {
    const words =
      "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --normalization RMSNorm --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 --tensor-model-parallel-size 1 --context-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --tokenizer-type HuggingFaceTokenizer --tokenizer-model meta-llama/Llama-3.1-8B --vocab-size 128256 --mock-data".split(
        " ",
      );
    const act = (drop: readonly string[]) => importMegatron({ kind: "words" }, { name: "a", world: 8, words, drop });
    expect(problemsOf(() => act([])).map((problem) => problem.split(":")[0])).toEqual(["--decoupled-lr 5.0e-4"]);
    const { train, model, parallel } = complete(act(["decoupled-lr"]));
    expect(train).toMatchObject({ steps: 15258789, loss_weighting: "token", gradients: "bf16" });
    // 40 million elements, of gradients and of parameters in 2 bytes
    expect(parallel).toMatchObject({ gradient_bucket: 76, parameter_bucket: 76, expert_overlap: "none" });
    expect(train.optimizer).toMatchObject({ decay_steps: 15228271.46875, warmup_steps: 30517.59375 });
    expect(model.vocab).toBe(128256);
  });

  test("GPT-3 175B has Megatron's defaults", () => {
    const words =
      "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 --attention-backend auto --micro-batch-size 1 --rampup-batch-size 16 16 5859375 --global-batch-size 1536 --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16".split(
        " ",
      );
    const { model, train, parallel } = complete(importMegatron({ kind: "words" }, { name: "gpt3", world: 128, words }));
    expect(model).toMatchObject({
      ...{
        ffn: 49152,
        vocab: 50257,
        vocab_multiple: 1024,
        activation: "gelu_tanh",
        norm: { type: "layernorm" },
        positions: "learned",
        max_positions: 2048,
      },
      ...{ qkv_bias: true, out_bias: true, mlp_bias: true, tie_embeddings: true, dropout: { attention: 0.1, hidden: 0.1 } },
    });
    expect(train).toMatchObject({ precision: "fp16", optimizer: { warmup_steps: 430, decay_steps: 430000 } });
    expect(parallel).toMatchObject({ data: 1, tensor: 8, pipeline: 16 });
    expect(parameterCount(model) / 1e9).toBeCloseTo(174.6, 0);
  });
});
