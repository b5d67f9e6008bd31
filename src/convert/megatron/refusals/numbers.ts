/** Refusals about precision, the optimizer and data parallelism. */
import {
  degree,
  excluding,
  hasChunks,
  isHalf,
  isQuantized,
  isSharded,
  type LaunchArguments,
  needing,
  type Refusal,
  recomputes,
  together,
} from "./refusal.ts";

const isDelayed = (l: LaunchArguments): boolean => l.has("fp8-format") && l.text("fp8-recipe") === "delayed";
/** Whether the layers in bf16 at an end of the model fit in a stage. */
const fitsStage = (l: LaunchArguments, name: string): boolean => {
  const count = l.number(name) ?? 1;
  return count >= 0 && count <= (l.number("num-layers") ?? 0) / degree.pipeline(l);
};

/** Refusals about precision. */
export const precision: readonly Refusal[] = [
  together("fp8-format", "fp4-format"),
  needing("fp8-param-gather", (l) => l.has("fp8-format"), "--fp8-format"),
  needing("fp4-param-gather", (l) => l.has("fp4-format"), "--fp4-format"),
  needing("fp8-param-gather", (l) => l.has("use-distributed-optimizer") || isSharded(l), "the distributed optimizer or FSDP"),
  excluding("first-last-layers-bf16", isDelayed, "--fp8-recipe delayed, the default"),
  ...["num-layers-at-start-in-bf16", "num-layers-at-end-in-bf16"].map(
    (name): Refusal => ({
      given: [name],
      when: (l) => l.has("first-last-layers-bf16") && !fitsStage(l, name),
      why: "these layers are within a stage",
      fix: "choose at most the layers of a stage",
    }),
  ),
  {
    given: ["fp8-recipe"],
    when: (l) => l.text("fp8-recipe") === "custom" && l.has("fp8-format") && !l.has("fp8-quantizer-factory"),
    why: "Megatron needs --fp8-quantizer-factory for it",
    fix: "give --fp8-quantizer-factory",
  },
  needing("fp8-output-proj", (l) => l.has("fp8-format") && l.text("fp8-recipe") === "mxfp8", "--fp8-format and --fp8-recipe mxfp8"),
  {
    given: ["fp8-format", "recompute-modules"],
    when: (l) => isDelayed(l) && (recomputes(l, "moe_act") || recomputes(l, "layernorm")),
    why: "Megatron's delayed scaling excludes this recomputation",
    fix: "use --fp8-recipe tensorwise",
  },
  needing("reuse-grad-buf-for-mxfp8-param-ag", (l) => l.has("fp8-param-gather"), "--fp8-param-gather"),
  needing("fp16-lm-cross-entropy", (l) => l.has("fp16"), "--fp16"),
  needing("fp32-residual-connection", isHalf, "--bf16 or --fp16"),
  needing("accumulate-allreduce-grads-in-fp32", (l) => l.text("main-grads-dtype") === "fp32", "--main-grads-dtype fp32", [
    "main-grads-dtype",
  ]),
  excluding("batch-invariant-mode", isQuantized, "--fp8-format or --fp4-format"),
];

const isAdam = (l: LaunchArguments): boolean => l.text("optimizer") === "adam";
const isEmerging = (l: LaunchArguments): boolean => !["adam", "sgd"].includes(l.text("optimizer") ?? "adam");
const states = ["main-grads-dtype", "main-params-dtype", "exp-avg-dtype", "exp-avg-sq-dtype"] as const;
const PRECISE = "use-precision-aware-optimizer";
const isDistributed = (l: LaunchArguments): boolean => l.has("use-distributed-optimizer") || l.text("optimizer") === "dist_muon";
const WITH_STEP = "overlap-param-gather-with-optimizer-step";

/** Refusals about the optimizer and data parallelism. */
export const optimizer: readonly Refusal[] = [
  needing("overlap-param-gather", (l) => isDistributed(l) || l.has("use-megatron-fsdp"), "the distributed optimizer or FSDP"),
  needing("overlap-param-gather", (l) => l.has("overlap-grad-reduce"), "--overlap-grad-reduce"),
  needing(WITH_STEP, (l) => isDistributed(l) && l.has("overlap-param-gather"), "the distributed optimizer and --overlap-param-gather"),
  needing(WITH_STEP, hasChunks, "chunks of stages"),
  needing(WITH_STEP, (l) => l.text("ckpt-format") === "torch", "--ckpt-format torch", ["ckpt-format"]),
  {
    given: [PRECISE, "optimizer"],
    when: (l) => l.has(PRECISE) && !isAdam(l),
    why: "Megatron has it for Adam alone",
    fix: "leave out --use-precision-aware-optimizer",
  },
  needing(PRECISE, (l) => l.has("use-distributed-optimizer"), "--use-distributed-optimizer"),
  ...states.map(
    (name): Refusal => ({
      given: [name],
      when: (l) => (l.text(name) ?? "fp32") !== "fp32" && !l.has(PRECISE),
      why: "Megatron keeps it in fp32 without --use-precision-aware-optimizer",
      fix: "leave it out",
    }),
  ),
  needing("optimizer-cpu-offload", (l) => l.has(PRECISE), `--${PRECISE}`),
  excluding("ddp-average-in-collective", (l) => l.has("calculate-per-token-loss"), "--calculate-per-token-loss"),
  together("ddp-num-buckets", "ddp-bucket-size"),
  {
    given: ["ddp-num-buckets"],
    when: (l) => (l.number("ddp-num-buckets") ?? 1) <= 0,
    why: "gradients are in one bucket at least",
    fix: "choose 1 or more",
  },
  {
    given: ["optimizer"],
    when: (l) => isEmerging(l) && (isSharded(l) || !["torch", "torch_dist"].includes(l.text("ckpt-format") ?? "torch_dist")),
    why: "Megatron has it without FSDP and with --ckpt-format torch or torch_dist alone",
    fix: "use --optimizer adam",
  },
  {
    given: ["optimizer", "fp16"],
    when: (l) => isEmerging(l) && l.has("fp16"),
    why: "Megatron has it without fp16 alone",
    fix: "use --bf16",
  },
  ...fsdp(),
];

function fsdp(): readonly Refusal[] {
  const name = "use-torch-fsdp2";
  return [
    needing(name, (l) => degree.pipeline(l) === 1 && degree.expert(l) === 1, "one stage and no expert parallelism"),
    excluding(name, (l) => l.has("use-distributed-optimizer"), "--use-distributed-optimizer"),
    needing(name, (l) => l.has("no-gradient-accumulation-fusion"), "--no-gradient-accumulation-fusion"),
    needing(
      name,
      (l) => ["torch_dist", "torch_dcp"].includes(l.text("ckpt-format") ?? "torch_dist"),
      "--ckpt-format torch_dist or torch_dcp",
      ["ckpt-format"],
    ),
    needing(name, (l) => l.has("untie-embeddings-and-output-weights"), "--untie-embeddings-and-output-weights"),
    excluding(name, (l) => l.has("fp16"), "--fp16"),
    needing("use-megatron-fsdp", (l) => ["adam", "sgd"].includes(l.text("optimizer") ?? "adam"), "--optimizer adam or sgd", ["optimizer"]),
    needing("use-megatron-fsdp", (l) => l.text("ckpt-format") === "fsdp_dtensor", "--ckpt-format fsdp_dtensor", ["ckpt-format"]),
    ...["moe-single-grouped-weight", "moe-single-grouped-bias"].map((weight) =>
      excluding("use-megatron-fsdp", (l) => l.has(weight), `--${weight}`),
    ),
  ];
}
