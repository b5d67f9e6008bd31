import { describe, expect, test } from "vitest";
import { evaluatePattern } from "../../src/convert/megatron/job/layerPattern.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { problemsOf } from "../support/importProblems.ts";
import { base, type Change, complete, expertsOf, imported, jobOf, latent, refusalOf } from "../support/megatronImport.ts";

describe("defaults of Megatron that are not rankc's", () => {
  test("dropout, Adam, weight decay, schedule, dispatch and the order of data are written", () => {
    const job = jobOf();
    expect(job.model.dropout).toEqual({ attention: 0.1, hidden: 0.1 });
    expect(job.train.optimizer).toMatchObject({ betas: [0.9, 0.999], weight_decay: 0.01, schedule: "linear", min_lr: 0, clip: 1 });
    expect(job.model.rope.theta).toBe(10000);
    expect(expertsOf()).toMatchObject({ dispatch: "all_gather", router: { balance: "aux_loss", aux_coeff: 0 } });
    expect(job.data.order).toBe("shuffled");
  });

  test("no precision is fp32", () => {
    expect(jobOf({ bf16: null }).train.precision).toBe("fp32");
    expect(jobOf().train.precision).toBe("bf16");
  });

  test("the absent expert tensor degree is the tensor degree, not 1", () => {
    expect(jobOf({ "tensor-model-parallel-size": "2" }).parallel.expert_tensor).toBe(2);
    expect(jobOf({ "tensor-model-parallel-size": "2", "expert-tensor-parallel-size": "1" }).parallel.expert_tensor).toBe(1);
  });

  test("embedding and head are tied unless a switch unties them", () => {
    expect(jobOf({ "untie-embeddings-and-output-weights": null }).model.tie_embeddings).toBe(true);
    expect(jobOf().model.tie_embeddings).toBe(false);
  });

  test("a launch without such arguments has LayerNorm, GELU, biases everywhere and learned positions", () => {
    const plain = { normalization: null, swiglu: null, "disable-bias-linear": null, "position-embedding-type": null, "num-experts": null };
    expect(jobOf(plain).model).toMatchObject({
      ...{
        norm: { type: "layernorm", zero_centered: false },
        activation: "gelu_tanh",
        ffn: 1024,
        positions: "learned",
        max_positions: 128,
      },
      ...{ qkv_bias: true, out_bias: true, mlp_bias: true },
    });
  });

  test("GELU is its tanh approximation where Megatron fuses it with biases, and exact elsewhere", () => {
    const gelu = { swiglu: null, "num-experts": null };
    expect(jobOf(gelu).model.activation).toBe("gelu");
    expect(jobOf({ ...gelu, "disable-bias-linear": null }).model.activation).toBe("gelu_tanh");
    expect(jobOf({ ...gelu, "disable-bias-linear": null, "no-bias-gelu-fusion": "" }).model.activation).toBe("gelu");
    expect(jobOf({ ...gelu, "squared-relu": "" }).model).toMatchObject({ activation: "squared_relu", ffn: 1024 });
    expect(jobOf({ ...gelu, "quick-geglu": "" }).model).toMatchObject({ activation: "quick_geglu", ffn: 1024 });
  });

  test("biases of experts and of the router are there where Megatron builds them, and refused where it refuses them", () => {
    expect(expertsOf({ "disable-bias-linear": null })).toMatchObject({ bias: true, router: { bias: true } });
    expect(expertsOf()).toMatchObject({ bias: false, router: { bias: false } });
    const biased = { "disable-bias-linear": null };
    expect(refusalOf({ ...biased, swiglu: null })).toMatch(/fail in the first step/);
    expect(refusalOf({ ...biased, "tensor-model-parallel-size": "2" })).toMatch(/biases of experts where their tensor degree is above 1/);
    expect(refusalOf({ ...biased, "moe-shared-expert-intermediate-size": "64" })).toMatch(/shared experts have no biases/);
    expect(refusalOf({ ...biased, "moe-grouped-gemm": "" })).toMatch(/fusion of dropout/);
    expect(refusalOf({ ...biased, swiglu: null, "squared-relu": "", "num-experts": null })).toMatch(/quick GeGLU alone/);
    expect(refusalOf({ "squared-relu": "" })).toMatch(/--swiglu --squared-relu: Megatron takes one of them alone/);
  });

  test("layer norms with gains less 1, a part of the head rotated, no positions, and the biases of queries, keys and values alone", () => {
    expect(jobOf({ "apply-layernorm-1p": "", normalization: "LayerNorm" }).model.norm).toMatchObject({
      type: "layernorm",
      zero_centered: true,
    });
    expect(jobOf({ "rotary-percent": "0.5" }).model.rope.fraction).toBe(0.5);
    expect(jobOf({ "position-embedding-type": "none" }).model.positions).toBe("none");
    expect(jobOf({ "add-qkv-bias": "" }).model).toMatchObject({ qkv_bias: true, out_bias: false });
    expect(refusalOf({ "position-embedding-type": null, "no-position-embedding": "" })).toMatch(/beside rotary positions alone/);
    expect(refusalOf({ "position-embedding-type": null, "mtp-num-layers": "1" })).toMatch(/--mtp-num-layers with learned positions/);
  });

  test("the feed-forward width of SwiGLU is 8/3 of the hidden size, down to a multiple of 64", () => {
    expect(jobOf({ "hidden-size": "1000" }).model.ffn).toBe(2624);
  });

  test("kv_heads are the heads; with --group-query-attention alone there is 1", () => {
    expect(jobOf().model.kv_heads).toBe(8);
    expect(jobOf({ "num-query-groups": "4" }).model.kv_heads).toBe(8);
    expect(jobOf({ "group-query-attention": "" }).model.kv_heads).toBe(1);
  });
});

describe("latent attention", () => {
  test("has YaRN with Megatron's factor of 1, which scales nothing, and ranks of the command line", () => {
    const { model } = jobOf(latent);
    expect(model.rope).toMatchObject({ interleaved: true, scaling: null });
    expect(model.mla).toMatchObject({ q_rank: null, kv_rank: 32, nope_dim: 128, rope_dim: 64, v_dim: 128, norm_eps: 1e-5 });
  });

  test("has YaRN over 4096 tokens where a factor is given, whatever the length of a sequence", () => {
    const { scaling } = jobOf({ ...latent, "rotary-scaling-factor": "40" }).model.rope;
    expect(scaling).toMatchObject({
      type: "yarn",
      factor: 40,
      original_seq: 4096,
      beta_fast: 32,
      beta_slow: 1,
      mscale: 1,
      mscale_all_dim: 0,
    });
    expect(jobOf({ ...latent, "rotary-scaling-factor": "40", "rope-type": "rope", "no-rope-fusion": "" }).model.rope.scaling).toBeNull();
  });

  test("has learned positions beside its own unless an argument says rope, and norms of latents if one asks for them", () => {
    const { model } = jobOf({
      ...latent,
      "position-embedding-type": null,
      "disable-bias-linear": null,
      "num-experts": null,
      "add-qkv-bias": "",
    });
    expect(model).toMatchObject({
      positions: "learned",
      rope: { interleaved: true },
      mla: { norm: true },
      qkv_bias: false,
      out_bias: true,
    });
    expect(jobOf({ "multi-latent-attention": "" }).model.mla).toMatchObject({ norm: false });
  });

  test("ignores kv-channels, with a note", () => {
    const result = imported({ ...latent, "kv-channels": "64" });
    expect(complete(result).model.head_dim).toBe(192);
    expect(result.withoutEffect).toContainEqual(expect.objectContaining({ argument: "--kv-channels 64", keys: [] }));
    expect(jobOf({ "kv-channels": "64" }).model.head_dim).toBe(64);
  });
});

describe("routers", () => {
  test("pre-softmax matters for softmax alone", () => {
    expect(expertsOf().router.normalize_top_k).toBe(true);
    expect(expertsOf({ "moe-router-pre-softmax": "" }).router.normalize_top_k).toBe(false);
    const sigmoid = { "moe-router-score-function": "sigmoid", "moe-router-pre-softmax": "" };
    expect(expertsOf(sigmoid).router.normalize_top_k).toBe(true);
    expect(expertsOf({ ...sigmoid, "moe-router-topk": "1" }).router.normalize_top_k).toBe(false);
    expect(refusalOf({ "moe-router-topk": "1" })).toContain("add --moe-router-pre-softmax");
  });

  test("groups count only beside group-topk", () => {
    expect(expertsOf({ "moe-router-num-groups": "4" }).router.groups).toBe(1);
    const grouped = expertsOf({ "moe-router-num-groups": "4", "moe-router-group-topk": "2" }).router;
    expect(grouped).toMatchObject({ groups: 4, group_top_k: 2 });
  });

  test("several balancing losses have several coefficients", () => {
    const change = { "moe-router-load-balancing-type": "aux_loss seq_aux_loss", "moe-aux-loss-coeff": "1e-2 1e-3" };
    expect(expertsOf(change).router).toMatchObject({ balance: ["aux_loss", "seq_aux_loss"], aux_coeff: [0.01, 0.001] });
  });

  test("Sinkhorn's method has scores of its own", () => {
    const sinkhorn = { "moe-router-load-balancing-type": "sinkhorn", "moe-router-score-function": "sigmoid" };
    expect(expertsOf(sinkhorn).router).toMatchObject({ balance: "sinkhorn", score: "softmax", normalize_top_k: false });
    expect(expertsOf({ ...sinkhorn, "moe-router-topk": "1" }).router).toMatchObject({ score: "sigmoid", normalize_top_k: false });
  });

  test("a negative capacity factor drops nothing", () => {
    expect(expertsOf({ "moe-expert-capacity-factor": "-1.0" }).capacity).toBe("dropless");
    expect(expertsOf({ "moe-expert-capacity-factor": "1.25" }).capacity).toEqual({ factor: 1.25, drop: "probs", pad: false });
  });
});

describe("which layers have experts", () => {
  test.each([
    ["([0]*1+[1]*3)", { first_dense: 1, every: 1 }],
    ["'([0]*1+[1]*3)'", { first_dense: 1, every: 1 }],
    [`"'[0]+[1]*3'"`, { first_dense: 1, every: 1 }],
    ["[1]*4", "all"],
    ["1", "all"],
    ["2", { first_dense: 0, every: 2 }],
    ["[0,1]*2", [0, 1, 0, 1]],
  ])("%s", (text, expected) => {
    expect(expertsOf({ "moe-layer-freq": text }).layers).toEqual(expected);
  });

  test("a list of the wrong length, and a text that is no list, are refused", () => {
    expect(refusalOf({ "moe-layer-freq": "[0]*3+[1]*58" })).toContain("the list has 61 items for 4 layers");
    expect(refusalOf({ "moe-layer-freq": "every" })).toContain("neither a period nor a list");
  });

  test("expressions have Python's values", () => {
    expect(evaluatePattern("(1+2)*3")).toBe(9);
    expect(evaluatePattern("2*[0,1]+[2]")).toEqual([0, 1, 0, 1, 2]);
    expect(evaluatePattern("[0]*99999999")).toBeUndefined();
    expect(evaluatePattern("[0]*")).toBeUndefined();
    expect(evaluatePattern("__import__('os')")).toBeUndefined();
  });
});

describe("samples and iterations", () => {
  test("samples become steps, and rates are quotients that need not be whole", () => {
    const change = { "train-iters": null, "train-samples": "1001", "global-batch-size": "16", "lr-warmup-fraction": "0.1" };
    const { train } = jobOf(change);
    expect(train.steps).toBe(62);
    expect(train.optimizer).toMatchObject({ decay_steps: 62.5625, warmup_steps: 6.25625 });
  });

  test("a run that counts in one does not take rates in the other", () => {
    expect(refusalOf({ "lr-decay-samples": "100" })).toContain("the run counts in iterations; use --lr-decay-iters");
    expect(refusalOf({ "train-samples": "100" })).toContain("a run counts in iterations or in samples");
  });

  test("overlapped communication of experts is interleaving, delayed gradients of weights with it; that of shared experts is by itself", () => {
    const experts = { "expert-model-parallel-size": "4", "moe-token-dispatcher-type": "alltoall", "global-batch-size": "64" };
    const overlapOf = (change: Change) => jobOf({ ...experts, ...change }).parallel.expert_overlap;
    expect(overlapOf({})).toBe("none");
    expect(overlapOf({ "overlap-moe-expert-parallel-comm": "" })).toBe("interleave");
    expect(overlapOf({ "overlap-moe-expert-parallel-comm": "", "delay-wgrad-compute": "" })).toBe("interleave");
    expect(overlapOf({ "moe-shared-expert-intermediate-size": "64", "moe-shared-expert-overlap": "" })).toBe("shared");
    expect(refusalOf({ ...experts, "delay-wgrad-compute": "" })).toContain("--overlap-moe-expert-parallel-comm");
  });

  test("the batch of a launch without one is the micro batch of all data ranks", () => {
    expect(jobOf({ "tensor-model-parallel-size": "2" }).train.global_batch).toBe(8);
  });
});

describe("vocabulary", () => {
  test("is padded to a multiple that depends on the tensor degree", () => {
    expect(jobOf().model).toMatchObject({ vocab: 1000, vocab_multiple: 128 });
    expect(jobOf({ "tensor-model-parallel-size": "4" }).model).toMatchObject({ vocab: 1000, vocab_multiple: 512 });
    expect(jobOf({ "vocab-size": "1024", "tensor-model-parallel-size": "4" }).model).toMatchObject({ vocab: 1024, vocab_multiple: 1 });
    expect(jobOf({ "padded-vocab-size": "1001" }).model).toMatchObject({ vocab: 1001, vocab_multiple: 1 });
  });

  test("is that of a known tokenizer, else of --vocab, else asked for", () => {
    const hub = (model: string) => ({ "tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": model, "vocab-size": null });
    expect(jobOf({ ...hub("deepseek-ai/DeepSeek-V3"), "make-vocab-size-divisible-by": "3232" }).model).toMatchObject({
      ...{ vocab: 128815, vocab_multiple: 3232 },
    });
    expect(refusalOf(hub("someone/else"))).toContain("--vocab N");
    expect(jobOf(hub("someone/else"), { vocab: 500 }).model).toMatchObject({ vocab: 500, vocab_multiple: 128 });
    expect(jobOf({ "tokenizer-type": null, "vocab-size": null }).model).toMatchObject({ vocab: 50257, vocab_multiple: 128 });
  });
});

describe("data", () => {
  const dataOf = (change: Change) => jobOf(change).data;

  test("prefixes become sources, each after its weight, with Megatron's split", () => {
    expect(dataOf({ "data-path": "0.3 a 0.7 b" })).toMatchObject({
      sources: [
        { path: "a", weight: 0.3 },
        { path: "b", weight: 0.7 },
      ],
    });
    expect(dataOf({ "data-path": "a b", split: "'99,1,0'" })).toMatchObject({ sources: [{ path: "a" }, { path: "b" }], split: [99, 1, 0] });
    expect(dataOf({ "data-path": "a" }).split).toEqual([969, 30, 1]);
  });

  test("mock data become a path that the user must set", () => {
    expect(dataOf({ "mock-data": "" })).toMatchObject({ path: "tokens.bin", order: "shuffled" });
  });
});

describe("stages", () => {
  const stages = (change: Change) => {
    const { layout, virtual_pipeline } = jobOf({
      "num-layers": "12",
      "pipeline-model-parallel-size": "4",
      "global-batch-size": "32",
      ...change,
    }).parallel;
    return { layout, virtual_pipeline };
  };

  test("layers of the first and the last stage become a layout, split over the chunks", () => {
    const ends = { "decoder-first-pipeline-num-layers": "2", "decoder-last-pipeline-num-layers": "2" };
    expect(stages(ends)).toEqual({ layout: "Ett|tttt|tttt|ttL", virtual_pipeline: 1 });
    const chunked = { ...ends, "num-virtual-stages-per-pipeline-rank": "2" };
    expect(stages(chunked)).toEqual({ layout: "Et|tt|tt|t|t|tt|tt|tL", virtual_pipeline: 2 });
    expect(refusalOf({ ...ends, "pipeline-model-parallel-size": "4", "num-layers": "11" })).toContain("do not spread evenly");
    const all = { "decoder-first-pipeline-num-layers": "6", "decoder-last-pipeline-num-layers": "6" };
    expect(refusalOf({ ...all, "pipeline-model-parallel-size": "4", "num-layers": "12" })).toContain("the other 0 layers do not spread");
  });

  test("an embedding and a loss that count as layers shorten the first and the last chunk", () => {
    const accounts = { "account-for-embedding-in-pipeline-split": "", "account-for-loss-in-pipeline-split": "" };
    expect(stages({ ...accounts, "num-layers": "14" })).toEqual({ layout: "Ettt|tttt|tttt|tttL", virtual_pipeline: 1 });
  });

  test("layers of a virtual stage give the chunks, and a layout gives both", () => {
    expect(stages({ "num-layers-per-virtual-pipeline-stage": "1" })).toEqual({ layout: null, virtual_pipeline: 3 });
    const layout = "'Et,|(tt|)*5t|L'";
    expect(stages({ "pipeline-model-parallel-layout": layout })).toEqual({ layout: "Et|(tt|)*5t|L", virtual_pipeline: 2 });
    expect(refusalOf({ "pipeline-model-parallel-size": "4", "pipeline-model-parallel-layout": "Et|ttL" })).toContain(
      "no multiple of 4 stages",
    );
  });

  test("sequence parallelism is cleared where the tensor degree is 1", () => {
    expect(jobOf({ "sequence-parallel": "" }).parallel.sequence).toBe(false);
    expect(jobOf({ "sequence-parallel": "", "tensor-model-parallel-size": "2" }).parallel.sequence).toBe(true);
  });
});

describe("Muon", () => {
  const muon = { optimizer: "muon" };

  test("has Megatron's defaults, which are not rankc's", () => {
    const { optimizer } = jobOf(muon).train;
    expect([optimizer.type, optimizer.muon, optimizer.betas, optimizer.weight_decay]).toEqual([
      "muon",
      { momentum: 0.9, nesterov: false, coefficients: "quintic", scale_mode: "spectral", extra_scale_factor: 1 },
      [0.9, 0.999],
      0.01,
    ]);
    expect(jobOf(muon).parallel.distributed_optimizer).toBe(false);
  });

  test("takes its arguments, and the job passes the rules", () => {
    const change = {
      "muon-momentum": "0.95",
      "muon-nesterov": "",
      "muon-scale-mode": "shape_scaling",
      "muon-extra-scale-factor": "0.2",
      "muon-coefficient-type": "simple",
      "muon-num-ns-steps": "5",
      "muon-tp-mode": "distributed",
      "muon-scalar-optimizer": "adam",
      "muon-fp32-matmul-prec": "high",
    };
    const { text, mapped, withoutEffect } = imported({ ...muon, ...change });
    expect(complete(imported({ ...muon, ...change })).train.optimizer.muon).toEqual({
      momentum: 0.95,
      nesterov: true,
      scale_mode: "shape_scaling",
      extra_scale_factor: 0.2,
      coefficients: "simple",
    });
    expect(withoutEffect.map(({ argument }) => argument)).toEqual(["--max-position-embeddings 128", "--muon-fp32-matmul-prec high"]);
    expect(mapped.length).toBe(Object.keys(base).length + 8);
    expect(readJob(text, "a.yaml").findings.filter(({ level }) => level === "error")).toEqual([]);
  });

  test("notes features that rankc computes in another way", () => {
    expect(jobOf(muon).train.optimizer.muon?.coefficients).toBe("quintic");
    expect(imported(muon).text).toMatch(/# .*gate and the up projection/);
  });

  test("features that rankc's Muon lacks are errors with alternatives", () => {
    const change = {
      "muon-coefficient-type": "polar_express",
      "muon-num-ns-steps": "8",
      "muon-scalar-optimizer": "lion",
      "muon-no-split-qkv": "",
      "muon-tp-mode": "blockwise",
      "tensor-model-parallel-size": "2",
    };
    expect(problemsOf(() => imported({ ...muon, ...change })).map((problem) => problem.replace(/:.*; /, "; "))).toEqual([
      "--muon-coefficient-type polar_express; --muon-coefficient-type quintic",
      "--muon-num-ns-steps 8; --muon-num-ns-steps 5",
      "--muon-tp-mode blockwise; --muon-tp-mode duplicated",
      "--muon-scalar-optimizer lion; --muon-scalar-optimizer adam",
      "--muon-no-split-qkv; leave out --muon-no-split-qkv",
    ]);
  });

  test("dist_muon shards the optimizer; details without Muon have no effect", () => {
    expect(jobOf({ optimizer: "dist_muon" }).parallel.distributed_optimizer).toBe(true);
    expect(jobOf({ optimizer: "dist_muon" }).train.optimizer.type).toBe("muon");
    expect(imported({ "muon-num-ns-steps": "8" }).withoutEffect.map(({ argument }) => argument)).toContain("--muon-num-ns-steps 8");
    expect(problemsOf(() => imported({ optimizer: "soap" }))[0]).toContain("--optimizer soap");
  });
});
