/** Arguments of Megatron-LM (commit d98e8a64) that a run reads and that do not change a plan, with the reason. `section.ts` describes the notation. */
import type { Section } from "./section.ts";

/** Arguments without effect on the plan. `why` completes "--NAME …". */
export const withoutEffect: readonly Section[] = [
  {
    why: "is a setting of the communication library, its diagnostics or its time limits",
    names: `
      pipeline-model-parallel-comm-backend:nccl|ucc use-ring-exchange-p2p distributed-backend:nccl|gloo=nccl
      distributed-timeout-minutes:int=10 local-rank:int nccl-communicator-config-path:text disable-gloo-process-groups use-sharp
      sharp-enabled-group:dp|dp_replica high-priority-stream-groups:text+ distributed-timeout-seconds-after-init:int
      flight-recorder-dump-path:text flight-recorder-trace-buffer-size:int=2000 no-flight-recorder-dump-on-timeout
      disable-flight-recorder-dump-on-timeout flight-recorder-include-stack-trace no-flight-recorder-include-only-active
      disable-flight-recorder-include-only-active no-flight-recorder-extra-dump-on-exec disable-flight-recorder-extra-dump-on-exec
      use-nccl-ub disable-symmetric-registration create-all-gather-group`,
  },
  {
    why: "changes which random numbers initialise the weights; rankc draws its own",
    names: `
      no-initialization use-cpu-initialization te-rng-tracker lazy-mpu-init`,
  },
  {
    why: "chooses kernels of Megatron; those of the plan are rankc's own",
    names: `
      deterministic-mode cross-entropy-loss-fusion cross-entropy-fusion-impl:native|te=native
      attention-backend:flash|fused|unfused|local|auto=auto flash-attention-version:2|3|4 disable-bf16-reduced-precision-matmul
      use-fused-weighted-squared-relu fused-residual-rmsnorm use-transformer-engine-op-fuser use-kitchen-attention
      kitchen-attention-backend:sdpa|fa=sdpa use-grouped-gemm-for-shared-expert use-grouped-gemm-for-dense-mlp moe-use-grouped-tensor
      moe-permute-fusion moe-router-fusion batch-invariant-mode batch-invariant-backend:te_native|deepgemm|triton=te_native
      use-te-activation-func transformer-impl:local|transformer_engine|inference_optimized=transformer_engine muon-use-syrk
      muon-fp32-matmul-prec:low|medium|high=medium no-use-layer-wise-param-layout
      no-masked-softmax-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm
      no-gradient-accumulation-fusion attention-softmax-in-fp32 disable-jit-fuser no-create-attention-mask-in-dataloader`,
  },
  {
    why: "runs communication beside computation: the same values",
    names: `
      no-tp-comm-bulk-wgrad disable-tp-comm-bulk-wgrad no-tp-comm-bulk-dgrad disable-tp-comm-bulk-dgrad
      no-tp-comm-overlap-ag disable-tp-comm-overlap-ag no-tp-comm-overlap-rs disable-tp-comm-overlap-rs tp-comm-overlap-rs-dgrad
      no-tp-comm-split-ag disable-tp-comm-split-ag no-tp-comm-split-rs disable-tp-comm-split-rs
      tp-comm-bootstrap-backend:nccl|mpi|gloo=nccl
      overlap-dispatch-backward-with-experts-wgrad defer-embedding-wgrad-compute wgrad-deferral-limit:int=0
      overlap-p2p-communication-warmup-flush high-priority-a2a-comm-stream tp-comm-overlap-cfg:text
      no-align-grad-reduce disable-align-grad-reduce no-overlap-p2p-communication
      ddp-num-buckets:int overlap-param-gather-with-optimizer-step no-align-param-gather gtp-remat-nccl-ub
      gtp-expert-remat-nccl-ub`,
  },
  {
    why: "saves memory in Megatron's runtime; the plan places memory itself",
    names: `
      ep-overlap-early-attn-memory-release distribute-saved-activations no-clone-scatter-output-in-embedding
      disable-clone-scatter-output-in-embedding mlp-chunks-for-training:int=1 moe-paged-stash moe-paged-stash-page-size:int=64
      moe-paged-stash-buffer-size-factor-cuda:float=1.1 moe-paged-stash-buffer-size-factor-cpu:float=0.0
      empty-unused-memory-level:0|1|2=0`,
  },
  {
    why: "is overwritten by Megatron from the layout",
    names: `
      mtp-standalone`,
  },
  {
    why: "keeps values in host memory; the plan keeps them on the device, so that its peak is higher",
    names: `
      cpu-offloading-num-layers:int=0 cpu-offloading-retain-pinned-cpu-buffers fine-grained-activation-offloading offload-modules:text+
      min-offloaded-tensor-size:int=1048576 delay-offload-until-cuda-graph delta-offload-bytes-across-pp-ranks:int=0
      activation-offload-fraction:float=1.0 fine-grained-offloading-max-inflight-offloads:int`,
  },
  {
    why: "changes how weights lie in memory and in checkpoints, not what is computed",
    names: `
      moe-shared-expert-glu-interleave-size:int moe-grouped-gemm moe-single-grouped-weight moe-single-grouped-bias
      moe-mlp-glu-interleave-size:int mla-down-proj-fusion`,
  },
  {
    why: "is a detail of Megatron's dispatcher libraries",
    names: `
      moe-enable-deepep moe-flex-dispatcher-backend:deepep|hybridep|ncclep=deepep moe-permute-fusion-into-hybridep
      moe-hybridep-pad-uneven-dispatch-inputs moe-flex-dispatcher-num-sms:int moe-deepep-num-sms:int moe-hybridep-num-sms:int
      moe-hybridep-num-blocks-permute:int moe-hybridep-num-blocks-unpermute:int moe-hybridep-num-sms-preprocessing:int=108
      moe-ncclep-zero-copy moe-dispatch-fwd-dtype:bf16|mxfp8=bf16 moe-combine-bwd-dtype:bf16|mxfp8=bf16`,
  },
  {
    why: "is an option of a run: rankc run --log DIR, --log-interval N; wandb sync reads its files",
    names: `
      tensorboard-dir:text log-interval:int=100 wandb-project:text wandb-exp-name:text wandb-save-dir:text wandb-entity:text`,
  },
  {
    why: "concerns what a run prints and records; the steps are the same",
    names: `
      moe-per-layer-logging config-logger-dir:text log-throughput log-progress
      timing-log-level:0|1|2=0 timing-log-option:max|minmax|all=minmax tensorboard-log-interval:int=1
      tensorboard-queue-size:int=1000 log-timers-to-tensorboard no-log-loss-scale-to-tensorboard disable-log-loss-scale-to-tensorboard
      log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-memory-interval:int log-device-memory-used log-num-zeros-in-grad
      log-max-attention-logit no-barrier-with-level-1-timing log-world-size-to-tensorboard logging-level:int
      log-energy`,
  },
  {
    why: "launches kernels through CUDA graphs: the same values",
    names: `
      enable-cuda-graph cuda-graph-warmup-steps:int=3 external-cuda-graph
      cuda-graph-impl:none|local|transformer_engine|full_iteration=none optimizer-cuda-graph
      cuda-graph-scope:attn|mlp|moe|moe_router|moe_preprocess|mamba|full|full_iteration|full_iteration_inference+
      cuda-graph-modules:attn|mlp|moe|moe_router|moe_preprocess|mamba|full|full_iteration|full_iteration_inference+`,
  },
  {
    why: "is what rankc does",
    names: `
      yarn-correction-range-round-to-int`,
  },
  {
    why: "is parsed, and never reaches the model: the factor of --use-rope-scaling stays 8",
    names: `
      rope-scaling-factor:float=8.0`,
  },
  {
    why: "is no longer read by Megatron",
    names: `
      openai-gelu onnx-safe:bool use-flash-attn use-mcore-models use-dist-ckpt dist-ckpt-format:text ckpt-fully-parallel-save
      enable-experimental`,
  },
  {
    why: "profiles a run; `rankc run --profile` does so",
    names: `
      profile profile-step-start:int=10 profile-step-end:int=12 use-pytorch-profiler pytorch-profiler-collect-shapes
      pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra profile-ranks:int+ record-memory-history
      memory-snapshot-path:text=snapshot.pickle record-shapes nvtx-ranges run-workload-inspector-server`,
  },
  {
    why: "checks or records values of a run for debugging",
    names: `
      check-weight-hash-across-dp-replicas-interval:int gpu-sniff-test-interval:int train-sync-interval:int
      dump-param-to-param-group-map:text save-params-interval:int save-activations-interval:int save-tokens-per-expert-interval:int
      save-wgrads-interval:int save-dgrads-interval:int test-mode moe-routing-trace-path:text moe-routing-trace-max-training-iters:int
      moe-routing-trace-capture-logits moe-routing-trace-capture-hidden-states moe-routing-trace-dump-weights log-straggler
      straggler-ctrlr-port:int=65535 straggler-minmax-count:int=1 disable-straggler-on-startup
      rerun-mode:disabled|validate_results|report_stats=validate_results`,
  },
  {
    why: "ends a run early: rankc run has --exit-after and --time-limit, and stops on an interrupt",
    names: `
      exit-interval:int exit-duration-in-mins:int exit-signal-handler exit-signal:text=SIGTERM exit-signal-handler-for-dataloader
      exit-signal-handler-for-training`,
  },
  {
    why: "controls Python's garbage collection",
    names: `
      manual-gc manual-gc-interval:int=0 no-manual-gc-eval disable-manual-gc-eval`,
  },
  {
    why: "concerns checks of the loss; rankc ends a run whose loss is not finite (train.on_nonfinite)",
    names: `
      no-check-for-nan-in-loss-and-grad check-for-large-grads check-for-spiky-loss`,
  },
  {
    why: "moves the optimizer's state or step to the host; the plan keeps it on the device, so that its peak is higher",
    names: `
      optimizer-cpu-offload optimizer-offload-fraction:float=1.0 use-torch-optimizer-for-cpu-offload overlap-cpu-optimizer-d2h-h2d
      no-pin-cpu-grads no-pin-cpu-params`,
  },
  {
    why: "is what rankc does: the job gives the schedule, also where a run resumes",
    names: `
      override-opt_param-scheduler override-opt-param-scheduler`,
  },
  {
    why: "has no effect without --decoupled-lr",
    names: `
      decoupled-min-lr:float`,
  },
  {
    why: "is an option of a run: rankc run --save DIR",
    names: `
      save:text`,
  },
  {
    why: "is an option of a run: rankc run --save-every N",
    names: `
      save-interval:int persistent-save-interval:int`,
  },
  {
    why: "concerns how checkpoints are written and read; `rankc run` has its own",
    names: `
      save-retain-interval:int load-main-params-from-ckpt non-persistent-save-interval:int
      non-persistent-ckpt-type:global|local|in_memory non-persistent-global-ckpt-dir:text non-persistent-local-ckpt-dir:text
      non-persistent-local-ckpt-algo:fully_parallel|atomic=fully_parallel ckpt-step:int no-use-tokenizer-model-from-checkpoint-args
      disable-use-tokenizer-model-from-checkpoint-args exit-on-missing-checkpoint
      ckpt-format:torch|torch_dist|torch_dcp|fsdp_dtensor=torch_dist auto-detect-ckpt-format no-ckpt-fully-parallel-save async-save
      async-strategy:nvrx|mcore=nvrx use-persistent-ckpt-worker async-ckpt-cpu-priority:int=10 async-ckpt-io-priority:int=3
      async-ckpt-use-cpu-shm ckpt-fully-parallel-load
      ckpt-fully-parallel-load-exchange-algo:broadcast|gather_rounds|gather_object=broadcast ckpt-fully-parallel-load-per-rank-objects
      ckpt-fully-parallel-save-process-group:dp|ep_dp=dp ckpt-fully-parallel-load-process-group:dp|ep_dp=dp
      ckpt-assume-constant-structure ckpt-pg-tensors-cache-path:text ckpt-pg-tensors-cache-create
      no-ckpt-load-validate-sharding-integrity disable-ckpt-load-validate-sharding-integrity no-strict-fsdp-dtensor-load
      disable-strict-fsdp-dtensor-load
      dist-ckpt-strictness:assume_ok_unexpected|log_unexpected|log_all|raise_unexpected|raise_all|return_unexpected|return_all|ignore_all=assume_ok_unexpected
      dist-ckpt-save-pre-mcore-014 dist-ckpt-optim-fully-reshardable distrib-optim-fully-reshardable-mem-efficient
      no-save-tokenizer-assets disable-save-tokenizer-assets replication replication-jump:int replication-factor:int=2 verify-integrity
      no-save-optim no-save-rng no-load-rng dist-ckpt-workers:int=1 ckpt-drop-redundant-extra-state`,
  },
  {
    why: "is an option of a run: rankc run --resume DIR",
    names: `
      load:text`,
  },
  {
    why: "is an option of a run: rankc run --resume DIR --only weights, or --init-from FILE",
    names: `
      finetune pretrained-checkpoint:text no-load-optim`,
  },
  {
    why: "is what rankc does: gradients are summed in fp32",
    names: `
      accumulate-allreduce-grads-in-fp32`,
  },
  {
    why: "changes the order in which gradients are summed or averaged: rounding alone",
    names: `
      ddp-pad-buckets-for-high-nccl-busbw ddp-average-in-collective no-gradient-reduce-div-fusion`,
  },
  {
    why: "changes how sums of bf16 gradients are rounded: rounding alone",
    names: `
      ddp-reduce-scatter-with-fp32-accumulation`,
  },
  {
    why: "concerns evaluation; the steps of training are the same",
    names: `
      start-eval-at-iter:int eval-global-batch-size:int eval-micro-batch-size:int multiple-validation-sets validation-set-names:text+`,
  },
  {
    why: "concerns how data files are opened, indexed and loaded",
    names: `
      per-dataset-sequences-path:text dataloader-fast-cache-load dataloader-defer-npy-index-mmap data-cache-path:text no-mmap-bin-files
      num-workers:int=2 num-dataset-builder-threads:int=1 object-storage-cache-path:text mid-level-dataset-surplus:float=0.005
      enable-msc disable-msc`,
  },
  {
    why: "concerns the tokenizer; a plan reads token ids",
    names: `
      allow-ambiguous-pad-tokens vocab-file:text merge-file:text tokenizer-metadata:text tokenizer-special-tokens:text+
      tiktoken-pattern:v1|v2 tiktoken-num-special-tokens:int=1000 tokenizer-sentencepiece-legacy
      no-tokenizer-sentencepiece-ignore-extra-whitespaces disable-tokenizer-sentencepiece-ignore-extra-whitespaces
      tokenizer-hf-no-use-fast tokenizer-hf-no-include-special-tokens trust-remote-code null-tokenizer-eod-id:int
      null-tokenizer-pad-id:int=-1 chat-template:text use-gigatoken`,
  },
  {
    why: "leaves the padding to the model, which pads to the same size",
    names: `
      no-pad-vocab-size disable-pad-vocab-size`,
  },
  {
    why: "talks to loggers and schedulers of one site",
    names: `
      adlr-autoresume adlr-autoresume-interval:int=1000 otel-enabled otel-service-name:text otel-span-groups:text no-one-logger
      one-logger-project:text=megatron-lm one-logger-run-name:text one-logger-async app-tag-run-name:text app-tag-run-version:text=0.0.0`,
  },
  {
    why: "has no effect without --moe-use-upcycling",
    names: `
      moe-upcycling-granularity:int=1`,
  },
  {
    why: "changes nothing alone: states of the optimizer stay fp32",
    names: `
      use-precision-aware-optimizer`,
  },
  {
    why: "concerns restarts and fault injection of a cluster",
    names: `
      inprocess-restart inprocess-max-iterations:int inprocess-monitor-thread-interval:float=1.0
      inprocess-monitor-process-interval:float=1.0 inprocess-progress-watchdog-interval:float=1.0 inprocess-heartbeat-interval:float=30
      inprocess-soft-timeout:float=60 inprocess-hard-timeout:float=90 inprocess-heartbeat-timeout:float=60
      inprocess-barrier-timeout:float=120 inprocess-completion-timeout:float=120 inprocess-last-call-wait:float=1
      inprocess-termination-grace-time:float=1 inprocess-granularity:node|rank=node inprocess-active-world-size:int
      inprocess-empty-cuda-cache enable-ft-package calc-ft-timeouts ft-num-warmup-iters:int=5 error-injection-rate:int=0
      error-injection-type:correct_result|transient_error|persistent_error=transient_error fault-injector-ranks:text
      fault-injector-num-ranks:int fault-injector-fault-types:text fault-injector-fault-probabilities:text
      fault-injector-fault-delay:float fault-injector-delay-start-iteration:int fault-injector-mtti-seconds:float
      fault-injector-offset-seconds:float fault-injector-seed:int`,
  },
  {
    why: "has no effect without --sft",
    names: `
      sft-tokenizer-prompt-format:text=nemotron-h-aligned`,
  },
  {
    why: "is an argument of Pai-Megatron-Patch that concerns its data and its tokenizer",
    names: `
      train-mode:text dataset:text max-padding-length:int`,
  },
];
