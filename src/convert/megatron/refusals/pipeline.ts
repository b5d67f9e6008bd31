/** Refusals about stages, and about concurrent work: overlap, recomputation, offloading and CUDA graphs. */
import {
  degree,
  dispatchesBy,
  excluding,
  hasChunks,
  hasExperts,
  isHalf,
  isSequenceParallel,
  isTransformerEngine,
  type LaunchArguments,
  needing,
  type Refusal,
  recomputes,
  together,
} from "./refusal.ts";

/** The microbatches of a step; undefined if a size is unknown. */
function microbatchesOf(l: LaunchArguments): number | undefined {
  const [batch, each] = [l.number("global-batch-size"), l.number("micro-batch-size")];
  return each === undefined ? undefined : (batch ?? each * l.data) / (each * l.data);
}
/** The number of consecutive microbatches of a chunk. */
const groupOf = (l: LaunchArguments): number => l.number("microbatch-group-size-per-virtual-pipeline-stage") ?? degree.pipeline(l);

/** Refusals about stages. */
export const stages: readonly Refusal[] = [
  ...(["decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"] as const).flatMap((name) => [
    together(name, "num-layers-per-virtual-pipeline-stage"),
    together(name, "account-for-embedding-in-pipeline-split"),
    together(name, "account-for-loss-in-pipeline-split"),
  ]),
  excluding("no-overlap-p2p-communication", (l) => hasChunks(l) && degree.pipeline(l) <= 2, "chunks of two stages"),
  needing(
    "overlap-p2p-communication-warmup-flush",
    (l) => hasChunks(l) && !l.has("no-overlap-p2p-communication"),
    "overlapped transfers between chunks",
    ["no-overlap-p2p-communication"],
  ),
  needing(
    "defer-embedding-wgrad-compute",
    (l) => degree.pipeline(l) > 1 && !l.has("no-gradient-accumulation-fusion"),
    "several stages and fused gradient accumulation",
  ),
  {
    given: ["wgrad-deferral-limit"],
    when: (l) => l.has("defer-embedding-wgrad-compute") && (l.number("wgrad-deferral-limit") ?? 0) < 0,
    why: "a limit is not negative",
    fix: "choose 0 or more",
  },
  {
    given: ["global-batch-size", "micro-batch-size", "microbatch-group-size-per-virtual-pipeline-stage"],
    when(l) {
      const count = microbatchesOf(l);
      return hasChunks(l) && degree.pipeline(l) > 1 && count !== undefined && (groupOf(l) > count || groupOf(l) < degree.pipeline(l));
    },
    why: "Megatron fails in its first step: with chunks, a group of microbatches has at least as many as there are stages, and at most those of a step",
    fix: "raise --global-batch-size; rankc itself runs any number",
  },
  {
    given: ["global-batch-size", "micro-batch-size", "microbatch-group-size-per-virtual-pipeline-stage"],
    when(l) {
      const count = microbatchesOf(l);
      if (!hasChunks(l) || count === undefined || groupOf(l) > count) return false;
      const left = count % groupOf(l);
      return left > 0 && left < degree.pipeline(l);
    },
    why: "Megatron fails in its first step: with chunks, the last group of microbatches has at least as many as there are stages",
    fix: "choose --global-batch-size so that no smaller group is left; rankc itself runs any number",
  },
];

/** Refusals about recomputation and offloading. */
export const memory: readonly Refusal[] = [
  {
    given: ["distribute-saved-activations", "recompute-granularity", "sequence-parallel"],
    when(l) {
      const isFull = l.text("recompute-granularity") === "full" && l.has("recompute-method");
      return l.has("distribute-saved-activations") && (degree.tensor(l) === 1 || !isFull || isSequenceParallel(l));
    },
    why: "Megatron takes it with several tensor ranks, full recomputation by a method, and without sequence parallelism alone",
    fix: "leave out --distribute-saved-activations",
  },
  {
    given: ["recompute-modules"],
    when: (l) => recomputes(l, "mla_up_proj") && !l.has("multi-latent-attention"),
    why: "mla_up_proj is a part of latent attention",
    fix: "leave it out, or give --multi-latent-attention",
  },
  {
    given: ["recompute-modules"],
    when: (l) => recomputes(l, "moe_act") && !l.has("moe-grouped-gemm"),
    why: "Megatron recomputes moe_act with --moe-grouped-gemm alone",
    fix: "give --moe-grouped-gemm",
  },
  excluding("moe-shared-expert-overlap", (l) => recomputes(l, "shared_experts"), "the recomputation of shared_experts", [
    "recompute-modules",
  ]),
  {
    given: ["cpu-offloading-num-layers", "pipeline-model-parallel-size", "recompute-granularity"],
    when(l) {
      const count = l.number("cpu-offloading-num-layers") ?? 0;
      const tooMany = count >= (l.number("num-layers") ?? count + 1);
      return count > 0 && (tooMany || degree.pipeline(l) > 1 || l.has("recompute-granularity"));
    },
    why: "Megatron offloads fewer layers than there are, on one stage, without recomputation",
    fix: "leave out --cpu-offloading-num-layers",
  },
  needing("fine-grained-activation-offloading", isTransformerEngine, "Transformer Engine", ["transformer-impl"]),
  needing("fine-grained-activation-offloading", (l) => l.list("offload-modules").length > 0, "a list of --offload-modules"),
  excluding("fine-grained-activation-offloading", (l) => (l.number("cpu-offloading-num-layers") ?? 0) > 0, "--cpu-offloading-num-layers", [
    "cpu-offloading-num-layers",
  ]),
  {
    given: ["offload-modules"],
    when: (l) => l.has("fine-grained-activation-offloading") && l.list("offload-modules").some((name) => !offloadable.has(name)),
    why: "Megatron has no such module",
    fix: "choose from attn_norm, qkv_linear, core_attn, attn_proj, mlp_norm, expert_fc1, moe_act, fused_group_mlp and gdp_qkv",
  },
  {
    given: ["offload-modules"],
    when: (l) => l.list("offload-modules").includes("attn_proj") && !l.list("offload-modules").includes("core_attn"),
    why: "Megatron offloads attn_proj with core_attn alone",
    fix: "add core_attn",
  },
  {
    given: ["offload-modules", "recompute-modules"],
    when: (l) => recomputes(l, "moe") && l.list("offload-modules").some((name) => name === "expert_fc1" || name === "moe_act"),
    why: "a module inside moe is recomputed with it",
    fix: "leave it out of --offload-modules",
  },
];
const offloadable = new Set("attn_norm qkv_linear core_attn attn_proj mlp_norm expert_fc1 moe_act fused_group_mlp gdp_qkv".split(" "));

const COMM = "overlap-moe-expert-parallel-comm";
/** Refusals about overlap. */
export const overlap: readonly Refusal[] = [
  needing("tp-comm-overlap", isSequenceParallel, "--sequence-parallel"),
  needing("moe-shared-expert-overlap", (l) => dispatchesBy(l, "alltoall", "flex"), "another dispatcher than allgather", [
    "moe-token-dispatcher-type",
  ]),
  excluding("moe-shared-expert-overlap", (l) => l.has("moe-latent-size"), "--moe-latent-size"),
  needing(COMM, (l) => degree.pipeline(l) === 1 || hasChunks(l), "chunks, where there are several stages"),
  needing(
    COMM,
    (l) => degree.expert(l) > 1 && dispatchesBy(l, "alltoall", "flex"),
    "several expert ranks, and another dispatcher than allgather",
    ["moe-token-dispatcher-type"],
  ),
  excluding(
    COMM,
    (l) => l.text("recompute-granularity") === "full" || recomputes(l, "moe"),
    "the recomputation of whole layers or of moe",
    ["recompute-modules"],
  ),
  needing(COMM, isHalf, "--bf16 or --fp16"),
  excluding(COMM, (l) => l.has("moe-shared-expert-overlap"), "--moe-shared-expert-overlap"),
  excluding(COMM, (l) => (l.number("mtp-num-layers") ?? 0) > 1, "more than one depth of multi-token prediction", ["mtp-num-layers"]),
  needing("delay-wgrad-compute", (l) => l.has(COMM), `--${COMM}`),
  needing("delay-wgrad-compute", isTransformerEngine, "Transformer Engine", ["transformer-impl"]),
  excluding(
    "overlap-dispatch-backward-with-experts-wgrad",
    (l) => l.has(COMM) || l.has("delay-wgrad-compute"),
    `--${COMM} or --delay-wgrad-compute`,
  ),
  needing("ep-overlap-early-attn-memory-release", (l) => l.has(COMM), `--${COMM}`),
];

const captures = (l: LaunchArguments, module: string): boolean => graphOf(l) !== "none" && l.list("cuda-graph-modules").includes(module);
const graphOf = (l: LaunchArguments): string => l.text("cuda-graph-impl") ?? "none";
const isPadded = (l: LaunchArguments): boolean => l.has("moe-expert-capacity-factor") && l.has("moe-pad-expert-input-to-capacity");
const graphs = ["cuda-graph-impl", "cuda-graph-modules"] as const;

/** Refusals about CUDA graphs. */
export const cudaGraphs: readonly Refusal[] = [
  together("enable-cuda-graph", "external-cuda-graph"),
  ...["enable-cuda-graph", "external-cuda-graph"].map((name) => together(name, "cuda-graph-impl")),
  {
    given: graphs,
    when: (l) => graphOf(l) === "full_iteration" && l.list("cuda-graph-modules").length > 0,
    why: "Megatron's graph of a whole iteration takes no modules",
    fix: "leave out --cuda-graph-modules",
  },
  {
    given: graphs,
    when: (l) => graphOf(l) === "full_iteration" && !l.has("no-check-for-nan-in-loss-and-grad"),
    why: "Megatron's graph of a whole iteration cannot check for NaN",
    fix: "give --no-check-for-nan-in-loss-and-grad",
  },
  {
    given: [...graphs, "cpu-offloading-num-layers"],
    when: (l) => !["none", "full_iteration"].includes(graphOf(l)) && (l.number("cpu-offloading-num-layers") ?? 0) > 0,
    why: "Megatron's graphs exclude the offloading of layers",
    fix: "leave out one of them",
  },
  {
    given: graphs,
    when: (l) => captures(l, "moe") && captures(l, "moe_router"),
    why: "moe contains moe_router",
    fix: "leave out one of them",
  },
  {
    given: graphs,
    when: (l) => captures(l, "moe_preprocess") && !captures(l, "moe_router"),
    why: "Megatron captures moe_preprocess with moe_router alone",
    fix: "add moe_router",
  },
  {
    given: graphs,
    when: (l) => ["moe", "moe_router", "moe_preprocess"].some((name) => captures(l, name)) && !hasExperts(l),
    why: "the model has no experts",
    fix: "leave out these modules",
  },
  {
    given: [...graphs, "moe-expert-capacity-factor", "moe-pad-expert-input-to-capacity"],
    when: (l) => captures(l, "moe") && !isPadded(l),
    why: "Megatron captures dropless experts not at all: sizes change in every step",
    fix: "give --moe-expert-capacity-factor and --moe-pad-expert-input-to-capacity",
  },
  {
    given: [...graphs, "recompute-granularity"],
    when: (l) => !["none", "full_iteration"].includes(graphOf(l)) && l.text("recompute-granularity") === "full",
    why: "Megatron recomputes whole layers in a graph of a whole iteration alone",
    fix: "use --cuda-graph-impl full_iteration, or selective recomputation",
  },
  {
    given: [...graphs, "recompute-modules"],
    when: (l) => graphOf(l) === "transformer_engine" && captures(l, "moe_router") && recomputes(l, "moe"),
    why: "a captured router cannot be recomputed",
    fix: "leave out one of them",
  },
];
