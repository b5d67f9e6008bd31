/** Arguments of Megatron-LM (commit d98e8a64) that rankc has no counterpart for, with an alternative. `section.ts` describes the notation. */
import type { Section } from "./section.ts";

/** Unsupported arguments. `why` states what rankc does; `instead` is the way out. A value that equals Megatron's default has no effect. */
export const unsupported: readonly (Section & { readonly instead: string })[] = [
  {
    why: "weights are sharded over tensor ranks and data ranks alone",
    instead: "use --tensor-model-parallel-size and --expert-tensor-parallel-size",
    names: `
      tensor-parallel-num-weight-shards:int expert-tensor-parallel-num-weight-shards:int gtp-remat-opt-in-modules:text+
      gtp-remat-reduce-scatter-with-fp32-accumulation`,
  },
  {
    why: "context parallelism has one level, the same for all sequences",
    instead: "use --context-parallel-size alone",
    names: `
      hierarchical-context-parallel-sizes:int+ max-seqlen-per-dp-cp-rank:int hybrid-context-parallel`,
  },
  {
    why: "each depth of multi-token prediction has a layer of its own, whose gradient reaches the model",
    instead: "use --mtp-num-layers alone",
    names: `
      mtp-use-repeated-layer mtp-detach-heads mtp-hsm`,
  },
  {
    why: "the residual stream has the precision of the model",
    instead: "train in fp32, or leave it out",
    names: `
      fp32-residual-connection`,
  },
  {
    why: "the residual stream is added before the norm",
    instead: "leave it out",
    names: `
      apply-residual-connection-post-layernorm`,
  },
  {
    why: "the activation of a gated unit has no offset and no clamp",
    instead: "leave it out",
    names: `
      glu-linear-offset:float=0.0 activation-func-clamp-value:float`,
  },
  {
    why: "norms of queries and keys have weights",
    instead: "use --qk-layernorm",
    names: `
      qk-l2-norm export-qk-l2-norm`,
  },
  {
    why: "weights of queries and keys are not rescaled after a step",
    instead: "leave it out",
    names: `
      qk-clip`,
  },
  {
    why: "attention has no gate",
    instead: "leave it out",
    names: `
      attention-output-gate`,
  },
  {
    why: "every layer has softmax attention",
    instead: "import a model without linear or sparse attention",
    names: `
      experimental-attention-variant:gdn|gdn2|dsa|gated_delta_net linear-attention-freq:pattern`,
  },
  {
    why: "all matrices are initialised with one standard deviation",
    instead: "use --init-method-std",
    names: `
      embedding-init-method-std:float`,
  },
  {
    why: "initialisation and learning rates do not depend on the width",
    instead: "leave it out",
    names: `
      use-mup`,
  },
  {
    why: "attention scores are not scaled by the number of the layer",
    instead: "leave it out: it changes rounding in fp16 alone",
    names: `
      apply-query-key-layer-scaling`,
  },
  {
    why: "products are computed in bf16, fp16 or fp32",
    instead: "--drop the argument to import the job in bf16",
    names: `
      fp8-format:e4m3|hybrid fp4-format:e2m1| te-precision-config-file:text kitchen-config-file:text kitchen-recipe-number:int`,
  },
  {
    why: "the router has no such mode",
    instead: "use --moe-router-force-load-balancing for benchmarks, or leave it out",
    names: `
      moe-enable-routing-replay moe-router-force-biased:float moe-apply-probs-on-input export-moe-apply-probs-on-input`,
  },
  {
    why: "a layer has one residual stream",
    instead: "leave it out",
    names: `
      enable-mhc-connections`,
  },
  {
    why: "positions have one dimension",
    instead: "import a text model",
    names: `
      mrope-section:int+`,
  },
  {
    why: "every layer has attention",
    instead: "import a model without Mamba layers",
    names: `
      is-hybrid-model hybrid-layer-pattern:text hybrid-override-pattern:text`,
  },
  {
    why: "the model is a decoder alone",
    instead: "use --num-layers and --seq-length",
    names: `
      decoder-num-layers:int decoder-seq-length:int`,
  },
  {
    why: "attention covers all earlier tokens",
    instead: "--drop the argument where sequences are no longer than the window",
    names: `
      window-size:text window-attn-skip-freq:pattern`,
  },
  {
    why: "the turning points of YaRN are whole channels",
    instead: "leave it out",
    names: `
      no-yarn-correction-range-round-to-int`,
  },
  {
    why: "every layer rotates queries and keys",
    instead: "leave it out",
    names: `
      no-rope-freq:pattern`,
  },
  {
    why: "parameters of one dim have no weight decay",
    instead: "leave it out",
    names: `
      apply-wd-to-qk-layernorm no-weight-decay-cond-type:apply_wd_to_qk_layernorm|`,
  },
  {
    why: "the batch grows by equal steps",
    instead: "use --rampup-batch-size",
    names: `
      step-batch-size-schedule:text`,
  },
  {
    why: "the batch is a multiple of micro_batch x data",
    instead: "choose --global-batch-size so that it is",
    names: `
      decrease-batch-size-if-needed`,
  },
  {
    why: "no step is skipped",
    instead: "leave it out",
    names: `
      iterations-to-skip:int+ result-rejected-tracker-filename:text`,
  },
  {
    why: "Megatron removed it",
    instead: "use --micro-batch-size",
    names: `
      batch-size:int`,
  },
  {
    why: "Megatron removed it",
    instead: "use --lr-warmup-fraction",
    names: `
      warmup:int`,
  },
  {
    why: "Megatron removed it",
    instead: "use --tensor-model-parallel-size",
    names: `
      model-parallel-size:int`,
  },
  {
    why: "Megatron removed it",
    instead: "use --recompute-activations",
    names: `
      checkpoint-activations`,
  },
  {
    why: "training predicts the next token of a text",
    instead: "give labels by data.labels",
    names: `
      perform-rl-step sft`,
  },
  {
    why: "weights are drawn from one normal distribution",
    instead: "use --init-method-std",
    names: `
      data-parallel-random-init init-method-xavier-uniform`,
  },
  {
    why: "the job gives the schedule and a checkpoint its step, also where a run resumes",
    instead: "leave it out",
    names: `
      use-checkpoint-opt_param-scheduler use-checkpoint-opt-param-scheduler override-ckpt-iteration:int`,
  },
  {
    why: "all parameters have one learning rate",
    instead: "--drop the argument to train embedding and head at --lr",
    names: `
      decoupled-lr:float`,
  },
  {
    why: "a job trains all parameters",
    instead: "leave it out",
    names: `
      freeze-all-layers skip-train fake-process-group freeze-base-for-mtp`,
  },
  {
    why: "the checkpoint is not read, and its arguments would replace these",
    instead: "write the model's arguments in the script",
    names: `
      use-checkpoint-args use-mp-args-from-checkpoint-args`,
  },
  {
    why: "it converts a checkpoint and trains nothing",
    instead: "leave it out",
    names: `
      ckpt-convert-format:torch|torch_dist ckpt-convert-save:text ckpt-convert-update-legacy-dist-opt-format`,
  },
  {
    why: "the loss is computed in fp32",
    instead: "--drop the argument for a loss in fp32, which takes more memory",
    names: `
      fp16-lm-cross-entropy output-logit-dtype:bf16|fp32`,
  },
  {
    why: "main weights are exact: what bf16 weights lack of fp32 is kept beside them",
    instead: "--drop the argument",
    names: `
      main-params-dtype:fp32|fp16=fp32`,
  },
  {
    why: "weights are not sharded over data ranks",
    instead: "use --use-distributed-optimizer, which shards the optimizer's state",
    names: `
      use-megatron-fsdp use-torch-fsdp2`,
  },
  {
    why: "data sources are the same for all steps, and stand in the job",
    instead: "use --data-path with weights and prefixes",
    names: `
      phase-transition-iterations:text data-args-path:text per-split-data-args-path:text`,
  },
  {
    why: "the token at the end of a document is its border",
    instead: "use --reset-attention-mask --reset-position-ids, which become data.documents",
    names: `
      dataloader-inter-document-masking`,
  },
  {
    why: "samples are not rewritten",
    instead: "leave it out",
    names: `
      fim-data`,
  },
  {
    why: "a dense checkpoint does not become experts",
    instead: "leave it out",
    names: `
      moe-use-upcycling`,
  },
  {
    why: "all layers are of one kind",
    instead: "import a model without it",
    names: `
      heterogeneous-layers-config-path:text heterogeneous-layers-config-encoded-json:text spec:text* enable-gpt-oss`,
  },
  {
    why: "training has no teacher and no quantisation",
    instead: "leave it out",
    names: `
      logits-save-dir:text logits-load-dir:text export-real-quant-cfg:fp8_real_quant|fp8_blockwise_real_quant|None export-quant-cfg:text
      export-kd-teacher-load:text export-kd-teacher-model-config:text export-kd-teacher-ckpt-format:torch|torch_dist|torch_dcp
      export-kd-cfg:text qad-train-target:base|mtp|both modelopt-enabled`,
  },
  {
    why: "the file replaces all other arguments",
    instead: "import its values as arguments after --",
    names: `
      yaml-cfg:text`,
  },
];
