/** Refusals about the batch, the checkpoint and the model's layers. */
import { degree, excluding, hasExperts, isTransformerEngine, needing, type Refusal, together } from "./refusal.ts";

/** Refusals about the length and the batch of a run, and its files. */
export const run: readonly Refusal[] = [
  ...["batch-size", "warmup", "model-parallel-size"].map((name): Refusal => {
    const instead = { "batch-size": "micro-batch-size", warmup: "lr-warmup-fraction", "model-parallel-size": "tensor-model-parallel-size" };
    return {
      given: [name],
      when: (l) => l.has(name),
      why: "Megatron removed it",
      fix: `give --${instead[name as keyof typeof instead]}`,
    };
  }),
  {
    given: ["max-position-embeddings"],
    when: (l) => !l.has("max-position-embeddings") && !l.has("use-checkpoint-args"),
    why: "--max-position-embeddings is not given, and Megatron has no default",
    fix: "give --max-position-embeddings, at least --seq-length",
  },
  {
    given: ["eval-global-batch-size", "eval-micro-batch-size"],
    when(l) {
      const all = l.number("eval-global-batch-size");
      const each = l.number("eval-micro-batch-size") ?? l.number("micro-batch-size") ?? 1;
      return all !== undefined && all % (each * l.data) !== 0;
    },
    why: "the batch of an evaluation is no multiple of its micro-batches on all data ranks",
    fix: "choose a multiple",
  },
  together("step-batch-size-schedule", "global-batch-size"),
  together("step-batch-size-schedule", "decrease-batch-size-if-needed"),
  // if only a shell can compute the folder, the same may hold for the interval
  needing("save", (l) => l.text("save") === undefined || (l.number("save-interval") ?? 0) > 0, "a positive --save-interval", [
    "save-interval",
  ]),
  {
    given: ["save-retain-interval", "save-interval"],
    when(l) {
      const [kept, each] = [l.number("save-retain-interval"), l.number("save-interval")];
      return kept !== undefined && each !== undefined && (kept <= 0 || kept % each !== 0);
    },
    why: "Megatron keeps a multiple of --save-interval",
    fix: "choose a multiple",
  },
  {
    given: ["log-memory-interval", "log-interval"],
    when: (l) => (l.number("log-memory-interval") ?? 0) % (l.number("log-interval") ?? 100) !== 0,
    why: "Megatron reports memory at multiples of --log-interval",
    fix: "choose a multiple",
  },
  needing("use-checkpoint-args", (l) => l.has("load"), "--load"),
  needing("ckpt-convert-format", (l) => l.has("save") && l.has("load"), "--save and --load"),
  needing("load-main-params-from-ckpt", (l) => l.has("no-load-optim"), "--no-load-optim"),
  needing(
    "replication",
    (l) => l.has("replication-jump") && l.text("non-persistent-ckpt-type") === "local",
    "--replication-jump and local checkpoints",
  ),
  excluding("ckpt-step", (l) => l.has("finetune"), "--finetune"),
  needing("moe-use-upcycling", (l) => l.has("save"), "--save"),
  {
    given: ["ckpt-format"],
    when: (l) => l.text("ckpt-format") === "torch_dcp" && (!l.has("use-torch-fsdp2") || degree.tensor(l) * degree.pipeline(l) > 1),
    why: "Megatron writes torch_dcp with --use-torch-fsdp2, on one stage and one tensor rank",
    fix: "use --ckpt-format torch_dist",
  },
  {
    given: ["ckpt-format"],
    when: (l) => l.text("ckpt-format") === "fsdp_dtensor" && !l.has("use-megatron-fsdp"),
    why: "Megatron writes fsdp_dtensor with --use-megatron-fsdp",
    fix: "use --ckpt-format torch_dist",
  },
];

/** Refusals about layers: attention, positions, norms and activations. */
export const layers: readonly Refusal[] = [
  together("swiglu", "squared-relu"),
  together("swiglu", "quick-geglu"),
  together("squared-relu", "quick-geglu"),
  {
    given: ["squared-relu"],
    when: (l) => l.has("squared-relu") && !l.has("disable-bias-linear") && !l.has("no-bias-gelu-fusion"),
    why: "Megatron's fusion of biases has GELU, SwiGLU and quick GeGLU alone",
    fix: "give --disable-bias-linear or --no-bias-gelu-fusion",
  },
  excluding("rotary-interleaved", (l) => l.has("multi-latent-attention"), "--multi-latent-attention"),
  {
    given: ["rope-type"],
    when: (l) => l.has("multi-latent-attention") && l.text("rope-type") === "rope" && !l.has("no-rope-fusion"),
    why: "Megatron's fused rotation in latent attention has YaRN alone",
    fix: "give --no-rope-fusion",
  },
  needing("mla-down-proj-fusion", (l) => l.has("multi-latent-attention"), "--multi-latent-attention"),
  excluding("qk-l2-norm", (l) => l.has("multi-latent-attention"), "--multi-latent-attention"),
  {
    given: ["position-embedding-type"],
    when: (l) => l.text("position-embedding-type") === "mrope" && !l.has("mrope-section"),
    why: "Megatron needs --mrope-section for it",
    fix: "give --mrope-section, or --position-embedding-type rope",
  },
  {
    given: ["position-embedding-type", "transformer-impl"],
    when: (l) => l.text("position-embedding-type") === "relative" && !isTransformerEngine(l),
    why: "Megatron has relative positions with Transformer Engine alone",
    fix: "leave out --transformer-impl",
  },
  {
    given: ["hierarchical-context-parallel-sizes", "context-parallel-size"],
    when(l) {
      const sizes = l.list("hierarchical-context-parallel-sizes").map(Number);
      return sizes.length > 0 && sizes.reduce((a, b) => a * b, 1) !== degree.context(l);
    },
    why: "their product is not the context degree",
    fix: "choose sizes whose product is --context-parallel-size",
  },
  {
    given: ["cp-comm-type"],
    when: (l) => l.list("cp-comm-type").includes("a2a+p2p") && !l.has("hierarchical-context-parallel-sizes"),
    why: "Megatron needs the sizes of the two levels",
    fix: "give --hierarchical-context-parallel-sizes",
  },
  {
    given: ["cp-comm-type", "num-layers"],
    when: (l) => l.list("cp-comm-type").length > 1 && l.list("cp-comm-type").length !== l.number("num-layers"),
    why: "a list has a method for each layer",
    fix: "give one method, or as many as layers",
  },
  {
    given: ["cp-comm-type", "num-query-groups", "context-parallel-size"],
    when(l) {
      const ranks = degree.tensor(l) * degree.context(l);
      const groups = l.has("group-query-attention") ? l.number("num-query-groups") : l.number("num-attention-heads");
      const uneven = [groups, l.number("num-attention-heads")].some((heads) => (heads ?? 0) % ranks !== 0);
      return degree.context(l) > 1 && l.text("cp-comm-type") === "a2a" && uneven;
    },
    why: "Megatron spreads heads over tensor and context ranks, and they do not divide them",
    fix: "use --cp-comm-type p2p",
  },
  {
    given: ["context-parallel-size", "transformer-impl"],
    when: (l) => degree.context(l) > 1 && l.text("transformer-impl") === "local",
    why: "Megatron's own attention has no context parallelism",
    fix: "leave out --transformer-impl local",
  },
  needing(
    "hybrid-context-parallel",
    (l) => l.has("calculate-per-token-loss") && degree.pipeline(l) === 1 && !l.has("use-megatron-fsdp"),
    "--calculate-per-token-loss, one stage and no FSDP",
  ),
  {
    given: ["attention-backend", "transformer-impl"],
    when: (l) => l.text("attention-backend") === "local" && l.text("transformer-impl") !== "local",
    why: "Megatron has it with --transformer-impl local alone",
    fix: "leave out --attention-backend local",
  },
  needing("fused-residual-rmsnorm", (l) => l.text("normalization") === "RMSNorm", "--normalization RMSNorm"),
  excluding("use-te-activation-func", (l) => l.has("squared-relu") || l.has("quick-geglu"), "this activation", [
    "squared-relu",
    "quick-geglu",
  ]),
  excluding(
    "use-te-activation-func",
    (l) => l.has("swiglu") && !l.has("no-bias-swiglu-fusion"),
    "the fusion of SwiGLU, which --no-bias-swiglu-fusion turns off",
  ),
  {
    given: ["no-rope-freq", "num-layers"],
    when(l) {
      const period = l.number("no-rope-freq");
      return period !== undefined && (l.number("num-layers") ?? 0) % period !== 0;
    },
    why: "the layers are no multiple of the period",
    fix: "choose a divisor of --num-layers",
  },
  {
    given: ["mup-base-hidden-size"],
    when: (l) => (l.number("mup-base-hidden-size") ?? 1) <= 0,
    why: "a width is positive",
    fix: "choose 1 or more",
  },
  {
    given: ["qk-clip-alpha", "qk-clip-threshold"],
    when(l) {
      const [alpha, threshold] = [l.number("qk-clip-alpha") ?? 0.5, l.number("qk-clip-threshold") ?? 100];
      return l.has("qk-clip") && (alpha <= 0 || alpha >= 1 || threshold <= 0);
    },
    why: "alpha lies between 0 and 1, and the threshold above 0",
    fix: "choose such numbers",
  },
  ...["batch-invariant-mode"].flatMap((name): Refusal[] => [
    needing(name, (l) => l.has("bf16"), "--bf16"),
    excluding(name, (l) => degree.context(l) > 1, "--context-parallel-size", ["context-parallel-size"]),
    needing(name, (l) => l.number("attention-dropout") === 0, "--attention-dropout 0", ["attention-dropout"]),
    excluding(name, (l) => hasExperts(l) && l.text("moe-token-dispatcher-type") !== "alltoall", "another dispatcher than alltoall"),
    excluding(name, (l) => l.has("moe-permute-fusion"), "--moe-permute-fusion"),
  ]),
];
