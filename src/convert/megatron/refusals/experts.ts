/** Refusals about experts: their dispatch, their products and their buffers. */
import {
  degree,
  dispatchesBy,
  excluding,
  hasExperts,
  isQuantized,
  type LaunchArguments,
  needing,
  type Refusal,
  recomputes,
  usesBackend,
} from "./refusal.ts";

const hasFuser = (l: LaunchArguments): boolean => l.has("use-transformer-engine-op-fuser");
const hasRankCapacity = (l: LaunchArguments): boolean => l.has("moe-expert-rank-capacity-factor");
const PAD = "moe-pad-expert-input-to-capacity";
const BACKEND = "moe-flex-dispatcher-backend";

/** Whether tokens or their gradients are sent in 8 bits. */
const sendsMxfp8 = (l: LaunchArguments): boolean =>
  ["moe-dispatch-fwd-dtype", "moe-combine-bwd-dtype"].some((name) => l.text(name) === "mxfp8");

const BIASED = "--num-experts without --disable-bias-linear";
const hasBiases = (l: LaunchArguments): boolean => hasExperts(l) && !l.has("disable-bias-linear");
const isGelu = (l: LaunchArguments): boolean => !["swiglu", "squared-relu", "quick-geglu"].some((name) => l.has(name));

/** Refusals about biases of experts, some of them when the model is built or in the first step. */
export const biases: readonly Refusal[] = [
  {
    given: [],
    otherwise: BIASED,
    when: (l) => hasBiases(l) && degree.expertTensor(l) > 1,
    why: "Megatron refuses biases of experts where their tensor degree is above 1",
    fix: "give --disable-bias-linear",
  },
  {
    given: ["moe-shared-expert-intermediate-size"],
    when: (l) => hasBiases(l) && (l.number("moe-shared-expert-intermediate-size") ?? 0) > 0,
    why: "Megatron's shared experts have no biases",
    fix: "give --disable-bias-linear",
  },
  {
    given: ["moe-grouped-gemm"],
    when: (l) => hasBiases(l) && l.has("moe-grouped-gemm") && !l.has("no-bias-dropout-fusion"),
    why: "Megatron refuses biases of grouped experts beside the fusion of dropout",
    fix: "give --disable-bias-linear, or --no-bias-dropout-fusion",
  },
  {
    given: [],
    otherwise: BIASED,
    when: (l) => hasBiases(l) && isGelu(l) && !l.has("no-bias-gelu-fusion"),
    why: "Megatron's experts have no fusion of biases with GELU, and fail in the first step",
    fix: "give --no-bias-gelu-fusion, or --disable-bias-linear",
  },
];

/** Refusals about experts. */
export const experts: readonly Refusal[] = [
  {
    given: ["moe-enable-deepep", "moe-token-dispatcher-type"],
    when: (l) => l.has("moe-enable-deepep") && !dispatchesBy(l, "flex"),
    why: "Megatron has DeepEP with the flex dispatcher alone",
    fix: "give --moe-token-dispatcher-type flex",
  },
  excluding("moe-enable-deepep", (l) => l.text(BACKEND) === "hybridep", "--moe-flex-dispatcher-backend hybridep", [BACKEND]),
  excluding(PAD, (l) => usesBackend(l, "deepep"), "DeepEP", [BACKEND]),
  {
    given: [BACKEND, "moe-token-dispatcher-type"],
    when: (l) => l.text(BACKEND) === "ncclep" && !dispatchesBy(l, "flex"),
    why: "Megatron has NCCL-EP with the flex dispatcher alone",
    fix: "give --moe-token-dispatcher-type flex",
  },
  {
    given: [BACKEND, "moe-use-grouped-tensor"],
    when: (l) => usesBackend(l, "ncclep") && l.has("moe-use-grouped-tensor") && !hasFuser(l),
    why: "Megatron's NCCL-EP needs --use-transformer-engine-op-fuser for grouped tensors",
    fix: "give it, or leave out --moe-use-grouped-tensor",
  },
  {
    given: [BACKEND, "moe-expert-capacity-factor", PAD],
    when: (l) => usesBackend(l, "ncclep") && (l.has("moe-expert-capacity-factor") || l.has(PAD)),
    why: "Megatron's NCCL-EP has no capacity",
    fix: "leave out the capacity",
  },
  needing("moe-ncclep-zero-copy", hasRankCapacity, "--moe-expert-rank-capacity-factor"),
  {
    given: ["moe-dispatch-fwd-dtype", "moe-combine-bwd-dtype"],
    when: (l) => sendsMxfp8(l) && !(usesBackend(l, "ncclep") && hasFuser(l) && l.has("moe-grouped-gemm")),
    why: "Megatron sends mxfp8 with NCCL-EP, the operation fuser and grouped products alone",
    fix: "leave it out",
  },
  needing("moe-expert-rank-capacity-factor", (l) => usesBackend(l, "hybridep", "ncclep"), "HybridEP or NCCL-EP", [BACKEND]),
  {
    given: ["moe-expert-rank-capacity-factor"],
    when: (l) => hasRankCapacity(l) && usesBackend(l, "hybridep") && !hasFuser(l) && !l.has("moe-use-grouped-tensor"),
    why: "Megatron takes it beside HybridEP with the operation fuser or grouped tensors alone",
    fix: "give --moe-use-grouped-tensor",
  },
  needing("moe-paged-stash", hasRankCapacity, "--moe-expert-rank-capacity-factor"),
  {
    given: ["moe-token-dispatcher-type", BACKEND],
    when: (l) => usesBackend(l, "deepep", "ncclep") && degree.expert(l) * degree.expertTensor(l) === 1,
    why: "Megatron's DeepEP and NCCL-EP need more than one rank of experts",
    fix: "use --moe-token-dispatcher-type alltoall",
  },
  ...["moe-router-padding-for-quantization", "moe-router-padding-for-fp8"].flatMap((name) => [
    needing(name, isQuantized, "--fp8-format or --fp4-format"),
    excluding(name, (l) => dispatchesBy(l, "allgather"), "the allgather dispatcher", ["moe-token-dispatcher-type"]),
  ]),
  ...["moe-use-grouped-tensor", "moe-single-grouped-weight", "moe-single-grouped-bias"].map((name) =>
    needing(name, (l) => l.has("moe-grouped-gemm"), "--moe-grouped-gemm"),
  ),
  ...["moe-single-grouped-weight", "moe-single-grouped-bias"].map((name) =>
    needing(name, (l) => l.has("moe-use-grouped-tensor"), "--moe-use-grouped-tensor"),
  ),
  excluding("moe-single-grouped-bias", (l) => l.has("disable-bias-linear"), "--disable-bias-linear"),
  excluding("fake-process-group", (l) => dispatchesBy(l, "flex"), "the flex dispatcher", ["moe-token-dispatcher-type"]),
  needing("moe-apply-probs-on-input", (l) => l.number("moe-router-topk") === 1, "--moe-router-topk 1", ["moe-router-topk"]),
  excluding("moe-shared-expert-overlap", (l) => recomputes(l, "moe") && l.has("overlap-moe-expert-parallel-comm"), "this overlap"),
  {
    given: ["moe-expert-capacity-factor", PAD],
    when(l) {
      const factor = l.number("moe-expert-capacity-factor");
      const most = (l.number("num-experts") ?? 0) / (l.number("moe-router-topk") ?? 2);
      return factor !== undefined && l.has(PAD) && most > 0 && factor > most;
    },
    why: "Megatron fails in its first step: experts are padded to more rows than there are tokens",
    fix: "choose a factor of at most experts / top-k",
  },
];
