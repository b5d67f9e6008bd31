/** Random jobs: any legal mesh of up to 16 ranks, any small model, and the same job on one rank. */
import fc from "fast-check";
import { stringify } from "yaml";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { buildMesh, hasSeparateGrids } from "../../src/passes/mesh.ts";
import { parallelOf } from "./job.ts";
import { adamw, latent, llama3, moe, type Parallel, shape, text, thirds, yarn } from "./meshLaw.ts";

/** All pairs of grids over 6 or 12 ranks whose strides do not nest. */
const apart = [6, 12].flatMap((ranks) => {
  const degrees = [1, 2, 3, 4, 6].filter((n) => ranks % n === 0);
  return degrees.flatMap((tensor) =>
    degrees.flatMap((context) =>
      degrees.flatMap((expert) =>
        degrees.flatMap((expert_tensor) => {
          const data = ranks / (tensor * context);
          if (!Number.isInteger(data) || ranks % (expert * expert_tensor) !== 0) return [];
          const grids = { tensor, context, data, expert, expert_tensor };
          const mesh = buildMesh({
            model: { kv_heads: tensor },
            parallel: parallelOf({ world: ranks, ...grids }),
            cluster: { nodes: 1, gpus_per_node: 8, device: "cpu" },
          });
          return hasSeparateGrids(mesh) ? [grids] : [];
        }),
      ),
    ),
  );
});
/** Layouts for two stages, of so many layers (t) and with what goes before the head (m). */
const layouts: Readonly<Record<string, (t: number, m: string) => string>> = {
  uneven: (t, m) => `${t === 2 ? "Ett|" : "Et|ttt"}${m}L`,
  "empty between": (t, m) => `E||t*${t},|${m}L`,
  "two empty": (t, m) => `Et*${t}|||${m}L`,
  "the first empty": (t, m) => `|Et|t*${t - 1}|${m}L`,
  "the last empty": (t, m) => (m ? `Et*${t}|${m}L` : `Et*${t - 1}|t|L|`),
};
const power = (max: number) => fc.integer({ min: 0, max }).map((n) => 2 ** n);
/** Draws are made smaller towards the first of each list. */
const oneOf = fc.constantFrom;
const router = fc.oneof(
  { weight: 2, arbitrary: fc.constant(moe.router) },
  {
    weight: 4,
    arbitrary: fc.record({
      score: oneOf("softmax", "sigmoid", "sqrt_softplus"),
      normalize_top_k: fc.boolean(),
      scaling: oneOf(1, 2.5),
      bias: fc.boolean(),
      precision: oneOf("model", "fp32"),
      jitter: oneOf(null, null, 0.05),
      groups: oneOf(1, 2),
      group_top_k: fc.constant(1),
      expert_bias: fc.boolean(),
      ...{ bias_rate: fc.constant(0.05), aux_coeff: fc.constant([0.05, 0.02]), z_coeff: fc.constant(0.01) },
      balance: oneOf(["aux_loss", "seq_aux_loss"], ["seq_aux_loss", "aux_loss"]),
    }),
  },
  oneOf<object>(
    { balance: "sinkhorn", normalize_top_k: false, z_coeff: 0.01 },
    { balance: "quantile", quantile_ema: 0.5 },
    { type: "expert_choice", normalize_top_k: false, z_coeff: 0.01 },
    { force: "uniform", score: "sigmoid", aux_coeff: 0.05 },
  ),
);
/** Draws a job and the same job on one rank; `labels`: a file of labels beside the corpus. */
export const anyJob = (labelsFile: string) =>
  fc
    .record({
      model: fc.record({
        layers: oneOf(2, 4),
        kv_heads: oneOf(4, 8, 2, 1),
        qk_norm: oneOf("none", "head", "full"),
        tie_embeddings: fc.boolean(),
        vocab_multiple: oneOf(1, 1, 24),
        qkv_bias: fc.boolean(),
        out_bias: fc.boolean(),
        positions: oneOf("rope", "rope", "rope", "learned", "none"),
        mlp_bias: fc.boolean(),
        norm: oneOf<object>({}, {}, { type: "layernorm" }, { type: "layernorm", zero_centered: true }, { zero_centered: true }),
        dropout: oneOf({}, {}, { hidden: 0.1 }, { attention: 0.2 }, { hidden: 0.2, attention: 0.1 }),
        activation: fc.oneof(
          { weight: 5, arbitrary: fc.constant("swiglu") },
          { weight: 3, arbitrary: oneOf("geglu", "gelu", "squared_relu") },
        ),
        rope: oneOf<object>({}, { interleaved: true }, { fraction: 0.5 }, { scaling: llama3 }, { interleaved: true, scaling: yarn }),
      }),
      mla: fc.option(oneOf(latent, { ...latent, q_rank: 10 }, { ...latent, norm: false }), { freq: 2 }),
      experts: fc.option(
        fc.record({
          experts: oneOf(4, 8),
          top_k: oneOf(2, 3),
          router,
          capacity: oneOf<unknown>(
            "dropless",
            "dropless",
            "dropless",
            { factor: 1 },
            { factor: 0.75, drop: "position" },
            { factor: 1, pad: true },
          ),
          dispatch: oneOf("all_to_all", "once", "once_per_node", "all_gather"),
          shared: oneOf(null, null, { ffn: 24 }, { ffn: 24, gate: true }),
          latent: oneOf(null, null, 16),
          bias: fc.boolean(),
          layers: oneOf<unknown>("all", "all", { first_dense: 1 }, { every: 2 }),
        }),
        { freq: 3 },
      ),
      parallel: fc.record({
        tensor: power(2),
        pipeline: power(1),
        context: power(2),
        data: power(3),
        expert: power(3),
        expert_tensor: power(2),
        apart: fc.oneof({ weight: 3, arbitrary: fc.constant(null) }, { weight: 1, arbitrary: oneOf(...apart) }),
        sequence: fc.boolean(),
        distributed_optimizer: fc.boolean(),
        context_method: oneOf("ring", "all_gather"),
        order: oneOf("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"),
      }),
      // what asks for stages, or for a shared state, is taken where there is one
      stages: oneOf(
        {},
        { virtual_pipeline: 2 },
        { schedule: "zero_bubble" },
        { virtual_pipeline: 2, schedule: "zero_bubble" },
        ...Object.keys(layouts).map((layout) => ({ layout })),
      ),
      // of chunks, an odd number of microbatches
      odd: fc.boolean(),
      optimizer_instances: power(1),
      // in MiB: buckets of one tensor and of several
      overlap: fc.record({
        gradient_bucket: oneOf<"none" | number>("none", "none", 0.02, 0.0001),
        parameter_bucket: oneOf<"none" | number>("none", "none", 0.01, 0.0001),
        parameter_gather: oneOf("step", "forward"),
        expert_overlap: oneOf("none", "shared", "interleave"),
        tensor_overlap: oneOf<"none" | "backward" | number>("none", "backward", 2),
      }),
      gradient_reduction: oneOf("f32", "f32", "bf16"),
      gpus_per_node: oneOf(8, 2, 4),
      recompute: oneOf<object>(
        { mode: "none" },
        { mode: "none" },
        { mode: "selective", modules: ["core_attn", "layernorm"] },
        { mode: "selective", modules: ["moe_act", "layernorm"] },
        { mode: "selective", modules: ["moe"] },
        { mode: "full", method: "block" },
        { mode: "full", layers: 2 },
      ),
      micro_batch: oneOf(1, 2),
      mtp: oneOf(null, null, { layers: 1, coeff: 0.3 }, { layers: 2, coeff: 0.5 }),
      optimizer: oneOf<object>(
        ...[adamw, adamw],
        { ...adamw, type: "adam", weight_decay: 0.1 },
        { type: "sgd", lr: 0.05, momentum: 0.9, weight_decay: 0.1 },
        { type: "sgd", lr: 0.05, momentum: 0 },
        { ...adamw, type: "muon", weight_decay: 0.1 },
      ),
      // the first step has half as many sequences as the second
      batch_rampup: oneOf(null, null, null, { start: 8, increment: 8, samples: 8 }),
      // the letter e ends a document: some have two tokens, some more than a shard of a sequence
      documents: oneOf<object | undefined>(
        ...[undefined, undefined],
        { end: 101 },
        { end: 101, positions: false },
        { end: 101, mask: false, loss: false },
        { end: 10, mask: true, loss: false },
      ),
      learnt: oneOf<[string | null, string]>([null, "microbatch"], [null, "microbatch"], [labelsFile, "microbatch"], [labelsFile, "token"]),
    })
    .map(
      ({
        model,
        mla,
        experts,
        parallel: { apart, ...degrees },
        stages,
        odd,
        optimizer_instances,
        overlap: { gradient_bucket, parameter_bucket, parameter_gather, expert_overlap, tensor_overlap },
        gradient_reduction,
        gpus_per_node,
        recompute,
        micro_batch,
        mtp,
        documents,
        learnt,
        batch_rampup,
        optimizer,
      }) => {
        const pair = experts && apart;
        const { data, ...drawn } = pair ? { ...degrees, ...pair, sequence: true } : degrees;
        // half as much again of all that a third of the ranks has, but sequences in a step: those are three quarters
        const half = (n: number) => (pair ? (3 * n) / 2 : n);
        const step = pair
          ? { global_batch: 12, ...(batch_rampup ? { batch_rampup: { start: 6, increment: 6, samples: 6 } } : {}) }
          : odd && data <= 2 && ("layout" in stages || "virtual_pipeline" in stages)
            ? { global_batch: 5 * micro_batch * data }
            : { global_batch: 16, batch_rampup };
        const layout = "layout" in stages ? layouts[stages.layout]!(model.layers, "m".repeat(mtp?.layers ?? 0)) : undefined;
        const own = {
          ...(layout !== undefined && (drawn.pipeline > 1 || odd) ? { layout } : drawn.pipeline === 1 ? {} : stages),
          ...(drawn.distributed_optimizer ? { optimizer_instances, parameter_bucket, parameter_gather } : {}),
          // a schedule without bubbles has no pairs
          ...{
            gradient_bucket,
            ...(experts ? { expert_overlap: "schedule" in stages && drawn.pipeline > 1 ? "shared" : expert_overlap } : {}),
            ...(drawn.sequence && drawn.tensor > 1 ? { tensor_overlap } : {}),
          },
          ...(gradient_bucket === "none" ? {} : { communication_sms: 8 }),
        };
        const world = drawn.tensor * drawn.pipeline * drawn.context * data;
        // heads of a latent have keys and values, and norms, of their own
        const latents = mla ? { mla, kv_heads: half(8), head_dim: undefined, qk_norm: "none", qkv_bias: false } : {};
        // those of latent attention rotate other channels, and a depth of multi-token prediction has no position of its own
        const rope = mla && "fraction" in model.rope ? {} : model.rope;
        const asked = mtp && model.positions === "learned" ? "none" : model.positions;
        // without rotation a bias adds the same to the scores of all keys: its gradient is rounding alone
        const { qkv_bias, qk_norm, norm } = model;
        const positions = !mla && (qkv_bias || ("type" in norm && qk_norm !== "none")) ? "rope" : asked;
        const mixed = experts ? { moe: { ffn: half(16), ...experts, experts: half(experts.experts) } } : {};
        const { tensor, context, sequence } = drawn;
        // an expert's capacity is decided by those who share their tokens: it depends on how a sequence is cut, and by nothing else
        const cut = { world: tensor * context, tensor, context, sequence };
        const alone: Parallel = !experts || experts.capacity === "dropless" ? { world: 1 } : cut;
        const shaped = shape({
          ...(pair ? thirds : {}),
          ...model,
          kv_heads: half(pair ? Math.max(2, model.kv_heads) : model.kv_heads),
          ...mixed,
          ...latents,
          ...{ mtp, rope, positions },
        });
        const [labels, loss_weighting] = learnt;
        const train = { micro_batch, loss_weighting, optimizer, ...step };
        const meshed = text(
          shaped,
          { ...drawn, ...own, world } as Parallel,
          { ...train, recompute, gradient_reduction },
          { labels, documents },
        );
        return {
          job: { ...meshed, cluster: { gpus_per_node } },
          alone: text(shaped, alone, train, { labels, documents }),
        };
      },
    )
    .filter(({ job }) => job.parallel.world! <= 16 && readJob(stringify(job), "law.yaml").job !== undefined);
