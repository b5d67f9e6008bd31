/** Arguments of Megatron-LM (commit d98e8a64) that `../job` reads. `section.ts` describes the notation. */
import type { Section } from "./section.ts";

/** Arguments that the importer maps. `why` completes "--NAME …" where an argument is given and not read, because another one decides. */
export const mapped = [
  {
    why: "is not read in this combination",
    names: `
      num-layers:int encoder-num-layers:int hidden-size:int ffn-hidden-size:int num-attention-heads:int seq-length:int
      encoder-seq-length:int normalization:LayerNorm|RMSNorm=LayerNorm norm-epsilon:float=1e-05 swiglu
      untie-embeddings-and-output-weights disable-bias-linear hidden-dropout:float=0.1 attention-dropout:float=0.1
      position-embedding-type:learned_absolute|rope|yarn|mrope|relative|none=learned_absolute micro-batch-size:int global-batch-size:int
      train-iters:int train-samples:int seed:int=1234 init-method-std:float=0.02 fp16 bf16
      optimizer:adam|sgd|muon|dist_muon|lion|soap|adaptive_muon=adam lr:float min-lr:float=0.0
      lr-decay-style:constant|linear|cosine|inverse-square-root|WSD=linear weight-decay:float=0.01
      weight-decay-incr-style:constant|linear|cosine=constant clip-grad:float=1.0 tensor-model-parallel-size:int=1
      pipeline-model-parallel-size:int=1 context-parallel-size:int=1 expert-tensor-parallel-size:int use-tp-pp-dp-mapping
      use-distributed-optimizer num-distributed-optimizer-instances:int=1 calculate-per-token-loss lr-warmup-init:float=0.0
      lr-warmup-iters:int=0 lr-warmup-samples:int=0 lr-warmup-fraction:float lr-decay-iters:int lr-decay-samples:int
      group-query-attention multi-latent-attention mtp-num-layers:int rampup-batch-size:int3 pipeline-model-parallel-layout:text
      num-layers-per-virtual-pipeline-stage:int num-virtual-stages-per-pipeline-rank:int decoder-first-pipeline-num-layers:int
      decoder-last-pipeline-num-layers:int account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
      recompute-granularity:full|selective recompute-activations moe-layer-recompute data-path:text* train-data-path:text* mock-data
      reset-position-ids reset-attention-mask eod-mask-loss log-params-norm`,
  },
  {
    why: "is read with --bf16 alone",
    names: `
      grad-reduce-in-bf16 main-grads-dtype:fp32|bf16=fp32 exp-avg-dtype:fp32|fp16|bf16|fp8=fp32
      exp-avg-sq-dtype:fp32|fp16|bf16|fp8=fp32`,
  },
  {
    why: "rankc sums all gradients over microbatches in fp32, which are then sent in bf16, or none: `all` asks for that",
    names: `
      ddp-param-name-patterns-for-fp32-local-accumulation:text+`,
  },
  {
    why: "is on where biases are, except with --multi-latent-attention",
    names: `
      add-qkv-bias`,
  },
  {
    why: "runs communication beside computation, and there is none to run here: the same values",
    names: `
      overlap-grad-reduce overlap-param-gather ddp-bucket-size:int moe-shared-expert-overlap overlap-moe-expert-parallel-comm
      tp-comm-overlap delay-wgrad-compute`,
  },
  {
    why: "changes GELU with biases alone",
    names: `
      no-bias-gelu-fusion`,
  },
  {
    why: "is accepted beside rope alone, where it does nothing",
    names: `
      no-position-embedding`,
  },
  {
    why: "bounds the table of learned positions, and rope has none",
    names: `
      max-position-embeddings:int`,
  },
  {
    why: "is what rankc has",
    names: `
      qk-layernorm apply-layernorm-1p softmax-type:vanilla|off-by-one|learnable=vanilla use-rotary-position-embeddings
      squared-relu quick-geglu microbatch-group-size-per-virtual-pipeline-stage:int dataloader-type:single|cyclic|external`,
  },
  {
    why: "has no effect without --group-query-attention",
    names: `
      num-query-groups:int=1`,
  },
  {
    why: "has no effect with --multi-latent-attention, whose heads have sizes of their own",
    names: `
      kv-channels:int rotary-interleaved use-rope-scaling`,
  },
  {
    why: "has no effect with the value 1, or with --multi-latent-attention",
    names: `
      rotary-seq-len-interpolation-factor:int`,
  },
  {
    why: "is a detail of rotary positions; with --multi-latent-attention all of its rotary channels are rotated",
    names: `
      rotary-base:int=10000 rotary-percent:float=1.0`,
  },
  {
    why: "has no effect without --multi-latent-attention",
    names: `
      q-lora-rank:int kv-lora-rank:int=32 qk-head-dim:int=128 qk-pos-emb-head-dim:int=64 v-head-dim:int=128 rope-type:rope|yarn qk-nope-head-dim:int qk-rope-head-dim:int`,
  },
  {
    why: "has no effect without YaRN, or where its factor is 1",
    names: `
      rotary-scaling-factor:float=1.0 mscale:float=1.0 mscale-all-dim:float=0.0 yarn-original-max-position-embeddings:int
      yarn-beta-fast:float yarn-beta-slow:float`,
  },
  {
    why: "has no effect without --mtp-num-layers",
    names: `
      mtp-loss-scaling-factor:float=0.1`,
  },
  {
    why: "has no effect where --padded-vocab-size gives the rows, or a tokenizer of known size",
    names: `
      make-vocab-size-divisible-by:int=128 vocab-size:int padded-vocab-size:int
      tokenizer-type:BertWordPieceLowerCase|BertWordPieceCase|GPT2BPETokenizer|SentencePieceTokenizer|GPTSentencePieceTokenizer|HuggingFaceTokenizer|Llama2Tokenizer|TikTokenizer|MultimodalTokenizer|NullTokenizer|NullMultimodalTokenizer|SFTTokenizer
      tokenizer-model:text extra-vocab-size:int patch-tokenizer-type:text`,
  },
  {
    why: "has no effect without --num-experts",
    names: `
      num-experts:int moe-layer-freq:pattern=1 moe-ffn-hidden-size:int moe-router-topk:int=2 moe-router-topk-scaling-factor:float
      moe-router-score-function:softmax|sigmoid|sqrtsoftplus=softmax moe-router-dtype:fp32|fp64 moe-router-enable-expert-bias
      moe-router-load-balancing-type:aux_loss|seq_aux_loss|global_aux_loss|sinkhorn|quantile_balancing|none+=aux_loss
      moe-aux-loss-coeff:float+=0.0 moe-router-force-load-balancing moe-z-loss-coeff:float moe-input-jitter-eps:float
      moe-token-dispatcher-type:allgather|alltoall|flex=allgather moe-expert-capacity-factor:float
      moe-shared-expert-intermediate-size:int moe-latent-size:int moe-expert-rank-capacity-factor:float expert-model-parallel-size:int=1`,
  },
  {
    why: "has no effect unless --moe-router-group-topk and --moe-router-num-groups are both given",
    names: `
      moe-router-num-groups:int moe-router-group-topk:int`,
  },
  {
    why: "changes softmax routers alone",
    names: `
      moe-router-pre-softmax`,
  },
  {
    why: "has no effect without --moe-router-enable-expert-bias",
    names: `
      moe-router-bias-update-rate:float=0.001`,
  },
  {
    why: "has no effect without quantile balancing",
    names: `
      moe-router-quantile-balancing-ema:float=0.0`,
  },
  {
    why: "has no effect without --moe-expert-capacity-factor",
    names: `
      moe-pad-expert-input-to-capacity moe-token-drop-policy:probs|position=probs`,
  },
  {
    why: "has no effect without a shared expert",
    names: `
      moe-shared-expert-gate`,
  },
  {
    why: "has no effect where the tensor degree is 1",
    names: `
      sequence-parallel`,
  },
  {
    why: "has no effect where the context degree is 1",
    names: `
      cp-comm-type:text+`,
  },
  {
    why: "has no effect without --recompute-granularity of that kind",
    names: `
      recompute-method:uniform|block recompute-num-layers:int recompute-modules:text+`,
  },
  {
    why: "has no effect without --lr-decay-style WSD",
    names: `
      lr-wsd-decay-style:exponential|linear|cosine|minus_sqrt=exponential lr-wsd-decay-iters:int lr-wsd-decay-samples:int`,
  },
  {
    why: "has no effect unless --weight-decay-incr-style lets weight decay grow",
    names: `
      start-weight-decay:float end-weight-decay:float`,
  },
  {
    why: "has no effect without --fp16",
    names: `
      loss-scale:float initial-loss-scale:float=4294967296 min-loss-scale:float=1.0 loss-scale-window:float=1000 hysteresis:int=2`,
  },
  {
    why: "belongs to the other optimizer",
    names: `
      adam-beta1:float=0.9 adam-beta2:float=0.999 adam-eps:float=1e-08 sgd-momentum:float=0.9`,
  },
  {
    why: "has no effect without --optimizer muon, or beside --multi-latent-attention",
    names: `
      muon-momentum:float=0.9 muon-nesterov muon-scale-mode:spectral|unit_rms_norm|shape_scaling=spectral
      muon-extra-scale-factor:float=1.0 muon-coefficient-type:text=quintic muon-num-ns-steps:int=5
      muon-tp-mode:blockwise|duplicated|distributed=duplicated muon-scalar-optimizer:adam|lion=adam muon-no-split-qkv`,
  },
  {
    why: "splits the data of --data-path, where their paths are known, or what an evaluation reads",
    names: `
      split:text`,
  },
  {
    why: "has no effect without --eval-interval, or with --eval-iters 0",
    names: `
      eval-interval:int eval-iters:int=100 full-validation valid-data-path:text* test-data-path:text*`,
  },
] as const satisfies readonly Section[];
