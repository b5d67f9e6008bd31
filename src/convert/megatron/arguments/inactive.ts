/** Arguments of Megatron-LM (commit d98e8a64) that belong to other programs, or to features that another argument must switch on. `section.ts` describes the notation. */
import type { Section } from "./section.ts";

/** Arguments without effect on the plan, because nothing in pretraining reads them alone. `why` completes "--NAME …". */
export const inactive: readonly Section[] = [
  {
    why: "serves inference",
    names: `
      moe-pad-experts-for-cuda-graph-inference inference-cuda-graph-scope:none|layer|block flash-decode
      symmetric-ar-type:two_shot|one_shot|multimem_all_reduce nccl-all-reduce-for-prefill inference-fuse-tp-communication
      inference-disable-triton-nvls-kernels inference-grouped-gemm-backend:flashinfer|torch|vllm=vllm
      inference-moe-disable-fused-quant-kernels inference-moe-token-dispatcher-type:nccl|nvls=nvls mlp-chunks-for-prefill:int=1
      inference-rng-tracker cache-mla-latents inference-batch-times-seqlen-threshold:int=-1 max-tokens-to-oom:int=12000
      output-bert-embeddings bert-embedder-type:megatron|huggingface=megatron use-legacy-static-engine inference-max-requests:int=8
      inference-max-seq-length:int=2560 inference-dynamic-batching inference-dynamic-batching-buffer-size-gb:float=40.0
      inference-dynamic-batching-paused-buffer-size-gb:float inference-dynamic-batching-mamba-memory-ratio:float
      inference-dynamic-batching-block-size:int=256 inference-dynamic-batching-max-requests:int
      inference-dynamic-batching-max-tokens:int inference-dynamic-batching-num-cuda-graphs:int=16
      inference-dynamic-batching-track-paused-request-events inference-dynamic-batching-track-generated-token-events
      decode-only-cuda-graphs inference-cuda-graph-all-prefills inference-cuda-graph-max-tokens:int=512
      inference-dynamic-batching-unified-memory-level:0|1=0 enable-chunked-prefill num-speculative-tokens:int=0
      inference-dynamic-batching-prefix-caching no-inference-dynamic-batching-prefix-caching
      inference-dynamic-batching-prefix-caching-eviction-policy:ref_zero|lru=ref_zero
      inference-dynamic-batching-prefix-caching-coordinator-policy:longest_prefix|first_prefix_block|load_balanced=load_balanced
      inference-dynamic-batching-prefix-caching-routing-alpha:float=0.5 inference-dynamic-batching-prefix-caching-mamba-gb:float
      inference-dynamic-batching-cuda-graph-mixed-prefill-count:int=16
      inference-dynamic-batching-cuda-graph-sizing-distribution:exponential|linear=exponential
      inference-dynamic-batching-sampling-backend:torch|flashinfer=torch use-same-sampling-seed-across-dp-ranks
      inference-dynamic-batching-async-sched-mode:legacy|async=legacy
      inference-dynamic-batching-logprobs-mode:raw_logprobs|processed_logprobs=raw_logprobs inference-logging-step-interval:int=0
      inference-text-gen-server-logging no-inference-text-gen-server-logging inference-wandb-logging no-inference-wandb-logging
      inference-coordinator-port:int mamba-inference-conv-states-dtype:bf16|fp16|fp32=bf16
      mamba-inference-ssm-states-dtype:bf16|fp16|fp32=bf16 inference-use-synchronous-zmq-collectives
      no-inference-use-synchronous-zmq-collectives inference-disable-ep-consensus no-inference-disable-ep-consensus
      inference-shards:text`,
  },
  {
    why: "serves reinforcement learning, which `pretrain_gpt.py` does not do",
    names: `
      rl-prompts-per-eval:int=32 grpo-prompts-per-step:int=32 grpo-group-size:int=2 rl-generation-lag:float rl-max-inflight-requests:int
      rl-submission-granularity:R|G|B=B rl-consumption-granularity:R|G|B=B rl-durable-rollout-bank rl-rollout-bank-dir:text
      rl-rollout-bank-max-bytes:int=0 grpo-iterations:int=2 grpo-clamp-eps-lower:float=0.01 grpo-clamp-eps-upper:float=0.01
      grpo-kl-beta:float=0.001 grpo-entropy-term-weight:float=0.0 grpo-filter-groups-with-same-reward langrl-env-config:text
      rl-default-temperature:float=1.0 rl-default-top-p:float=0 rl-default-top-k:int=-1 rl-offload-optimizer-during-inference
      rl-kv-cache-management-mode:persist|offload|recompute=persist rl-persist-cuda-graphs no-rl-persist-cuda-graphs rl-partial-rollouts
      no-rl-partial-rollouts rl-inference-logprobs-is-correction no-rl-inference-logprobs-is-correction
      rl-importance-sampling-truncation-coef:float rl-use-sequence-packing no-rl-use-sequence-packing
      rl-sequence-packing-max-sequences-per-bin:int=50 rl-sequence-packing-algo:fifo|round-robin=fifo rl-training-cuda-graphs
      no-rl-training-cuda-graphs rl-inference-tensor-model-parallel-size:int rl-inference-pipeline-model-parallel-size:int
      rl-inference-expert-model-parallel-size:int rl-inference-expert-tensor-model-parallel-size:int
      rl-inference-model-unified-memory-level:0|1=0 rl-offload-inference-model-weights-when-idle
      no-rl-offload-inference-model-weights-when-idle refit-method:nccl|gloo|nvshmem=gloo rl-verify-model-weights-swap
      no-rl-verify-model-weights-swap rl-skip-bos-token no-rl-skip-bos-token rl-profile rl-profile-dir:text rl-inference-parsers:text*`,
  },
  {
    why: "belongs to models that `pretrain_gpt.py` does not build",
    names: `
      bert-no-binary-head sample-rate:float=1.0 mask-prob:float=0.15 short-seq-prob:float=0.1 vocab-extra-ids:int=0 ict-head-size:int
      biencoder-projection-dim:int=0 biencoder-shared-query-context-model ict-load:text bert-load:text titles-data-path:text
      query-in-block-prob:float=0.1 use-one-sent-docs evidence-data-path:text retriever-report-topk-accuracies:int+
      retriever-score-scaling block-data-path:text embedding-path:text indexer-batch-size:int=128 indexer-log-interval:int=1000
      num-classes:int=1000 img-h:int=224 img-w:int=224 num-channels:int=3 patch-dim:int=16 classes-fraction:float=1.0
      data-per-class-fraction:float=1.0 no-data-sharding head-lr-mult:float=1.0 vision-pretraining
      vision-pretraining-type:classify|inpaint|dino=classify vision-backbone-type:vit|mit|swin=vit swin-backbone-type:tiny|base|h3=tiny
      mask-type:random|row=random mask-factor:float=1.0 iter-per-epoch:int=1250 dino-local-img-size:int=96
      dino-local-crops-number:int=10 dino-head-hidden-size:int=2048 dino-bottleneck-size:int=256 dino-freeze-last-layer:float=1
      dino-norm-last-layer dino-warmup-teacher-temp:float=0.04 dino-teacher-temp:float=0.07 dino-warmup-teacher-temp-epochs:int=30`,
  },
  {
    why: "is a detail of --experimental-attention-variant, and has no effect without it",
    names: `
      dsa-indexer-n-heads:int dsa-indexer-head-dim:int dsa-indexer-topk:int dsa-indexer-topk-freq:int=1
      dsa-indexer-skip-topk-offset:int=0 dsa-indexer-loss-coeff:float dsa-indexer-use-sparse-loss
      dsa-kernel-backend:none|tilelang|cudnn=none dsa-indexer-rope-interleaved no-dsa-indexer-rotate-activation
      disable-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu disable-dsa-indexer-scoring-relu
      dsa-indexer-k-norm-epsilon:float dsa-indexer-k-norm-fp32 linear-conv-kernel-dim:int=4 linear-key-head-dim:int=128
      linear-value-head-dim:int=128 linear-num-key-heads:int=16 linear-num-value-heads:int=32`,
  },
  {
    why: "is a detail of FSDP, and has no effect without it",
    names: `
      init-model-with-meta-device megatron-fsdp-version:1|2=1 fsdp-manual-registration
      data-parallel-sharding-strategy:no_shard|optim|optim_grads|optim_grads_params=optim_grads_params
      outer-dp-sharding-strategy:no_shard|optim=no_shard fsdp-double-buffer suggested-communication-unit-size:int
      enable-full-sharding-in-hsdp torch-fsdp2-no-reshard-after-forward megatron-fsdp-main-params-dtype:fp32|bf16|fp16|auto=fp32
      megatron-fsdp-main-grads-dtype:fp32|bf16|fp16|auto=auto megatron-fsdp-grad-comm-dtype:fp32|fp16|bf16|auto=auto
      megatron-fsdp-enable-fine-grained-param-gather megatron-fsdp-max-pool-double-buffer fsdp-db-use-persist-buf-on-alloc-fail`,
  },
  {
    why: "is a detail of hybrid models, and has no effect without --hybrid-layer-pattern",
    names: `
      mtp-hybrid-override-pattern:text mamba-state-dim:int=128 mamba-head-dim:int=64 mamba-num-groups:int=8 mamba-num-heads:int
      gdp-num-householder:int=3 disable-mamba-mem-eff-path gdp-cutedsl-kernel gdp-num-chunk-states-to-recompute:int=2
      mamba-training-ssm-states-dtype:fp32|bf16`,
  },
  {
    why: "is a detail of --use-mup, and has no effect without it",
    names: `
      mup-width-mult:float=1.0 mup-base-hidden-size:int mup-embedding-mult:float=1.0 mup-output-mult:float=1.0 mup-base-head-dim:float
      mup-attn-scale-power:float=1.0`,
  },
  {
    why: "is a detail of --enable-mhc-connections, and has no effect without it",
    names: `
      mhc-num-residual-streams:int=4 mhc-sinkhorn-iterations:int=20 mhc-init-gating-factor:float=0.01 mhc-recompute-layer-num:int`,
  },
  {
    why: "is a detail of --fim-data, and has no effect without it",
    names: `
      fim-rate:float=0.5 fim-spm-rate:float=0.5 fim-split-sample:text fim-fragment-rate:float fim-no-prefix:text
      fim-prefix-token:text=<fim_prefix> fim-middle-token:text=<fim_middle> fim-suffix-token:text=<fim_suffix>
      fim-pad-token:text=<fim_pad> fim-eod-token:text=<|endoftext|>`,
  },
  {
    why: "is a detail of --logits-save-dir and --logits-load-dir, and has no effect without them",
    names: `
      logits-save-top-k:int logits-save-top-p:float logits-save-top-p-min-k:int=1 logits-save-dtype:fp16|bf16|fp32=fp16
      logits-load-decode-threads:int=4 logits-load-prefetch-factor:int=3 logits-load-msc-prefetch-depth:int=2
      logits-load-kd-loss-alpha:float=1.0 logits-load-ignore-errors`,
  },
  {
    why: "is a detail of quantisation and distillation, and has no effect alone",
    names: `
      export-model-type:GPTModel|HybridModel|MambaModel=GPTModel export-legacy-megatron export-te-mcore-model export-default-te-spec
      export-force-local-attention export-kv-cache-quant:none|fp8|fp8_affine|nvfp4|nvfp4_affine|nvfp4_rotate=none
      finetune-hf-dataset:text finetune-data-split:text=train finetune-data-files:text+ export-offline-model`,
  },
  {
    why: "is a detail of --position-embedding-type relative, and has no effect without it",
    names: `
      relative-attention-num-buckets:int=32 relative-attention-max-distance:int=128`,
  },
  {
    why: "is a detail of --optimizer lion or of --qk-clip, and has no effect without it",
    names: `
      qk-clip-alpha:float=0.5 qk-clip-threshold:float=100 lion-beta1:float=0.95 lion-beta2:float=0.98`,
  },
  {
    why: "is a detail of 8-bit or 4-bit products, and has no effect without --fp8-format or --fp4-format",
    names: `
      fp8-recipe:tensorwise|delayed|mxfp8|blockwise|custom=delayed fp8-quantizer-factory:text fp8-margin:int=0 fp8-interval:int=1
      fp8-amax-history-len:int=1 fp8-amax-compute-algo:most_recent|max=most_recent no-fp8-wgrad disable-fp8-wgrad fp8-output-proj
      first-last-layers-bf16 num-layers-at-start-in-bf16:int=1 num-layers-at-end-in-bf16:int=1 fp4-recipe:nvfp4|custom=nvfp4
      fp4-quantizer-factory:text moe-router-padding-for-quantization moe-router-padding-for-fp8 reuse-grad-buf-for-mxfp8-param-ag
      keep-fp8-transpose-cache fp4-param-gather fp8-param-gather`,
  },
];
