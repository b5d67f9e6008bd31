/** `rankc import megatron`: what becomes of arguments, of what a launch leaves out, and of public recipes (fixtures/megatron). */
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { parse } from "yaml";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import { parameterCount } from "../../src/analysis/parameterCount.ts";
import type { ImportedJob } from "../../src/convert/importedJob.ts";
import { argumentSpecs } from "../../src/convert/megatron/arguments/spec.ts";
import { importMegatron, type MegatronSettings } from "../../src/convert/megatron/importMegatron.ts";
import { evaluatePattern } from "../../src/convert/megatron/job/layerPattern.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { root } from "../support/checkout.ts";
import { problemsOf } from "../support/importProblems.ts";
import { fixture } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";

/** A model that rankc has, with experts; each test adds to it or leaves out of it. */
const base = {
  "num-layers": "4",
  "hidden-size": "256",
  "num-attention-heads": "8",
  "seq-length": "128",
  "max-position-embeddings": "128",
  "position-embedding-type": "rope",
  normalization: "RMSNorm",
  swiglu: "",
  "untie-embeddings-and-output-weights": "",
  "disable-bias-linear": "",
  "num-experts": "8",
  "tokenizer-type": "NullTokenizer",
  "vocab-size": "1000",
  "micro-batch-size": "2",
  "train-iters": "100",
  lr: "1e-3",
  bf16: "",
};

type Change = Readonly<Record<string, string | null>>;

function wordsOf(change: Change): string[] {
  const all: Change = { ...base, ...change };
  return Object.entries(all).flatMap(([name, value]) => (value === null ? [] : [`--${name}`, ...value.split(" ").filter((w) => w !== "")]));
}

const imported = (change: Change = {}, settings: Partial<MegatronSettings> = {}): ImportedJob =>
  importMegatron({ kind: "words" }, { name: "a", world: 8, words: wordsOf(change), ...settings });
const complete = ({ text }: ImportedJob): Job => completeJob(JobText.parse(parse(text)));
const jobOf = (change: Change = {}, settings: Partial<MegatronSettings> = {}): Job => complete(imported(change, settings));
const expertsOf = (change: Change = {}) => {
  const { moe } = jobOf(change).model;
  if (moe === null) throw new Error("the job has no experts");
  return moe;
};

const refusalOf = (change: Change): string => problemsOf(() => imported(change)).join("\n");

const latent = { "multi-latent-attention": "", "qk-layernorm": "" };

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

test("the folder of the entry script need not be known", () => {
  const lines = ["#!/bin/bash", "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8", `options="${wordsOf({}).join(" ")}"`];
  // biome-ignore lint/suspicious/noTemplateCurlyInString: an expansion of bash
  const text = [...lines, 'run_cmd="python -u $(dirname $0)/pretrain_gpt.py ${options}"', 'srun -l sh -c "${run_cmd}"'].join("\n");
  expect(complete(importMegatron({ kind: "script", text, file: "run.sh" }, { name: "a" })).parallel.world).toBe(32);
});

describe("arguments", () => {
  test("every argument of Megatron-LM is in the table, with a reason unless it is mapped", () => {
    expect(argumentSpecs.size).toBe(907);
    for (const { name, fate, why, instead } of argumentSpecs.values()) {
      expect(why, name).not.toBe("");
      if (fate === "unsupported") expect(instead, name).toBeTruthy();
    }
  });

  test("every argument that the table maps is read", () => {
    const folder = join(root, "src/convert/megatron/job");
    const code = readdirSync(folder)
      .map((file) => readFileSync(join(folder, file), "utf8"))
      .join("\n");
    const unread = [...argumentSpecs.values()].filter(({ name, fate }) => fate === "mapped" && !code.includes(`"${name}"`));
    expect(unread.map(({ name }) => name)).toEqual([]);
  });

  test("nothing is dropped: each given argument is mapped, or without effect with a reason", () => {
    const { mapped, withoutEffect } = imported({ "num-query-groups": "4", "no-rope-fusion": "", "log-interval": "1" });
    expect(mapped.length + withoutEffect.length).toBe(Object.keys(base).length + 3);
    expect(withoutEffect.map(({ argument }) => argument)).toEqual([
      "--max-position-embeddings 128",
      "--num-query-groups 4",
      "--no-rope-fusion",
      "--log-interval 1",
    ]);
    for (const { why } of withoutEffect) expect(why).toBeTruthy();
  });

  test("features that rankc lacks are errors with alternatives, and can be left out on request", () => {
    const change = { "fp8-format": "hybrid", "use-mup": "" };
    expect(problemsOf(() => imported(change))).toEqual([
      "--fp8-format hybrid: in rankc, products are computed in bf16, fp16 or fp32; --drop fp8-format to import the job in bf16",
      "--use-mup: in rankc, initialisation and learning rates do not depend on the width; leave it out",
    ]);
    const { dropped, text } = imported(change, { drop: ["fp8-format", "--use-mup"] });
    expect(dropped.map(({ argument }) => argument)).toEqual(["--fp8-format", "--use-mup"]);
    expect(text).toContain("# --fp8-format is left out on request.");
  });

  test("an unsupported argument with Megatron's default has no effect", () => {
    expect(refusalOf({ "main-params-dtype": "fp32", "glu-linear-offset": "0.0" })).toBe("");
    expect(refusalOf({ ...precise, "main-params-dtype": "fp16" })).toContain("main weights are exact");
  });

  const precise = { "use-precision-aware-optimizer": "", "use-distributed-optimizer": "" };
  test("sums of gradients and moments are imported in bf16 where Megatron has them in bf16", () => {
    const { train } = jobOf({ ...precise, "main-grads-dtype": "bf16", "exp-avg-dtype": "bf16", "exp-avg-sq-dtype": "bf16" });
    expect([train.gradients, train.optimizer.moments]).toEqual(["bf16", "bf16"]);
    const typesOf = (args: Parameters<typeof jobOf>[0]) => {
      const { gradients, gradient_reduction } = jobOf(args).train;
      return `${gradients} ${gradient_reduction}`;
    };
    expect(typesOf({ "grad-reduce-in-bf16": "" })).toBe("bf16 bf16");
    // fp32 sums that are asked for win, and without --bf16 Megatron does not read it
    expect(typesOf({ "grad-reduce-in-bf16": "", "accumulate-allreduce-grads-in-fp32": "" })).toBe("f32 f32");
    expect(typesOf({ "grad-reduce-in-bf16": "", bf16: null })).toBe("f32 f32");
    // sums over microbatches in fp32, over ranks in bf16
    const local = "ddp-param-name-patterns-for-fp32-local-accumulation";
    expect(typesOf({ "grad-reduce-in-bf16": "", [local]: "all" })).toBe("f32 bf16");
    expect(typesOf({ "grad-reduce-in-bf16": "", [local]: "*norm*" })).toBe("bf16 bf16");
    expect(typesOf({ [local]: "all" })).toBe("f32 f32");
    expect(refusalOf({ ...precise, "exp-avg-dtype": "bf16" })).toContain("both moments have one type");
    expect(refusalOf({ ...precise, "exp-avg-dtype": "fp8", "exp-avg-sq-dtype": "fp8" })).toContain("both moments have one type");
  });

  test("an unknown argument is an error with the nearest name", () => {
    expect(refusalOf({ "num-layer": "4" })).toContain("--num-layer 4: Megatron-LM has no such argument; --num-layers is the nearest");
  });

  test("types are Megatron's: rotary-base is a whole number", () => {
    expect(refusalOf({ "rotary-base": "1e6" })).toContain("--rotary-base 1e6: Megatron reads a whole number here");
    expect(refusalOf({ "cross-entropy-fusion-impl": "te" })).toBe("");
    expect(refusalOf({ "lr-decay-style": "cosin" })).toContain("write one of constant, linear, cosine");
    expect(refusalOf({ "cuda-graph-impl": "all" })).toContain("--cuda-graph-impl all: Megatron has no such choice");
  });

  test("numbers are read as Python reads them", () => {
    expect(jobOf({ "train-iters": "1_000", lr: ".5e-3", "min-lr": "1_0.e-5" }).train).toMatchObject({
      steps: 1000,
      optimizer: { lr: 5e-4, min_lr: 1e-4 },
    });
    expect(expertsOf({ "moe-aux-loss-coeff": "1_0e-3" }).router.aux_coeff).toBe(0.01);
    for (const lr of ["0x10", "1e", "inf", "1__0", "0b1"])
      expect(
        problemsOf(() => imported({ lr })),
        lr,
      ).toHaveLength(1);
    for (const iterations of ["0x10", "1e3", "1_"]) expect(problemsOf(() => imported({ "train-iters": iterations }))).toHaveLength(1);
  });

  test("of an argument that is given twice the last counts", () => {
    expect(complete(imported({}, { words: [...wordsOf({}), "--lr", "5e-4"] })).train.optimizer.lr).toBe(5e-4);
    expect(complete(imported({}, { words: [...wordsOf({}), "--lr=5e-4"] })).train.optimizer.lr).toBe(5e-4);
  });

  test.each([
    [{ "num-layers-per-virtual-pipeline-stage": "1", "num-virtual-stages-per-pipeline-rank": "2" }, "Megatron takes one of them alone"],
    [{ "pipeline-model-parallel-layout": "EttttL", "decoder-first-pipeline-num-layers": "4" }, "Megatron takes one of them alone"],
    [{ "mock-data": "", "data-path": "x" }, "Megatron takes one of them alone"],
    [{ "moe-pad-expert-input-to-capacity": "" }, "refuses it without --moe-expert-capacity-factor"],
    [{ "moe-pad-expert-input-to-capacity": "", "moe-expert-capacity-factor": "-1" }, "there is no capacity"],
    [{ "num-experts": null, "moe-ffn-hidden-size": "64" }, "refuses it without --num-experts"],
    [{ "num-experts": null, "expert-model-parallel-size": "2" }, "the model has no experts"],
    [{ "seq-length": "256" }, "a sequence has more tokens than positions"],
    [{ "start-weight-decay": "0.1" }, "weight decay is constant"],
    [{ "recompute-granularity": "selective", "recompute-method": "block" }, "takes no layers"],
    [{ fp16: "" }, "Megatron refuses them together"],
  ] satisfies [Change, string][])("a combination that Megatron refuses is refused, and not imported in part: %j", (change, expected) => {
    expect(refusalOf(change)).toContain(expected);
  });

  test("--no-position-embedding beside rope does nothing", () => {
    expect(jobOf({ "no-position-embedding": "" })).toEqual(jobOf());
  });
});

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
    expect(model.moe).toMatchObject({ layers: { first_dense: 3 }, shared: { ffn: 2048 }, dispatch: "once" });
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

describe("the command", () => {
  const script = fixture("megatron/moonlight.sh");

  test("prints only the job to stdout, and the summary to stderr", async () => {
    const { exit, out, err } = await rankc("import", "megatron", "--world", "8", "--", ...wordsOf({}));
    expect([exit, JobText.safeParse(parse(out)).success]).toEqual([0, true]);
    expect(err).toContain("16 mapped, 1 without effect on the plan, 0 left out on request, 0 unsupported");
  });

  test("with --format json prints what became of each argument, and the problems with exit code 2", async () => {
    const good = await rankc("import", "megatron", "--world", "8", "--format", "json", "--", ...wordsOf({}));
    const { job, mapped, without_effect, problems } = JSON.parse(good.out);
    expect([good.exit, JobText.safeParse(parse(job)).success, mapped.length, without_effect.length, problems]).toEqual([
      0,
      true,
      16,
      1,
      [],
    ]);
    const bad = await rankc("import", "megatron", script, "--format", "json");
    expect(bad.exit).toBe(2);
    const found = JSON.parse(bad.out);
    expect(found.job).toBeNull();
    expect(found.problems).toContainEqual(expect.objectContaining({ kind: "value", subject: "line 19: --lr $5" }));
  });

  test("reads the scripts that a script reads, from its folder", async () => {
    const folder = mkdtempSync(join(tmpdir(), "rankc-launch-"));
    writeFileSync(join(folder, "model.sh"), `ARGS=(${wordsOf({}).join(" ")})\n`);
    // biome-ignore lint/suspicious/noTemplateCurlyInString: an expansion of bash
    writeFileSync(join(folder, "run.sh"), 'source model.sh\ntorchrun --nproc-per-node=8 pretrain_gpt.py "${ARGS[@]}"\n');
    try {
      const { exit, out } = await rankc("import", "megatron", join(folder, "run.sh"));
      expect([exit, parse(out).name, parse(out).parallel.world]).toEqual([0, "run", 8]);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test("a script with several launches needs a choice", async () => {
    const folder = mkdtempSync(join(tmpdir(), "rankc-launch-"));
    const launch = (ranks: number) => `torchrun --nproc_per_node ${ranks} pretrain_gpt.py ${wordsOf({}).join(" ")}\n`;
    writeFileSync(join(folder, "run.sh"), `${launch(4)}${launch(8)}`);
    try {
      const path = join(folder, "run.sh");
      const several = await rankc("import", "megatron", path);
      expect([several.exit, several.err]).toEqual([2, expect.stringContaining("has 2 launches:")]);
      const { out } = await rankc("import", "megatron", path, "--launch", "2");
      expect(parse(out).parallel.world).toBe(8);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});

describe("documents in one sequence", () => {
  test("each argument is a key of data.documents; without them there is none", () => {
    const data = { "data-path": "corpus" };
    expect(jobOf(data).data.documents).toBeUndefined();
    expect(jobOf({ ...data, "reset-attention-mask": "", "eod-mask-loss": "" }).data.documents).toEqual({
      ...{ mask: true, positions: false, loss: true, end: null },
    });
    expect(jobOf({ ...data, "reset-position-ids": "" }).data.documents).toMatchObject({ mask: false, positions: true, loss: false });
  });
  test("without known data the job has a token to replace", () => {
    expect(jobOf({ "mock-data": "", "reset-attention-mask": "" }).data.documents?.end).toBe(0);
    expect(imported({ "mock-data": "", "reset-attention-mask": "" }).text).toContain("end is to be set");
  });
});
