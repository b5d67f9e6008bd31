/**
 * The schema of jobs: names, types, ranges and defaults. `JobText` is the file as written; `Job` is the same with every default filled
 * in. Conditions between keys are rules (src/rules).
 */

import { z } from "zod";
import { lengthOf } from "./batchRampup.ts";
import { deviceNames } from "./devices.ts";
import { depthsOf } from "./mtp.ts";

/** The largest number of layers, and of depths of multi-token prediction: bounds on the size of a plan, far above any model. */
const LAYERS = 4096;
/** Attention of each layer visits as many ranks one after another, and each visit is instructions of the plan. */
const CONTEXT = 256;
const DEPTHS = 64;
/** The largest finite float32. Kernels receive float32 attributes, and larger numbers would be infinite. */
export const LARGEST = (2 - 2 ** -23) * 2 ** 127;
/** The smallest float32 that no device flushes to zero. */
export const SMALLEST = 2 ** -126;

const count = z.int().min(1);
const real = z.number().min(-LARGEST).max(LARGEST);
/** A factor that is multiplied by counts or normal draws before conversion to float32; the bound keeps products finite. */
const factor = z.number().min(-1e30).max(1e30);

const Norm = z.strictObject({
  type: z
    .literal("rmsnorm")
    .default("rmsnorm")
    .describe("the normalisation before attention, before the feed-forward part and before the head"),
  eps: real.default(1e-5).describe("added to the mean square under the root"),
});

const RopeScalingText = z.strictObject({
  type: z
    .enum(["linear", "llama3", "yarn"])
    .describe(
      "which wavelengths are stretched: all of them; or long ones, by how often they turn within original_seq tokens (llama3, yarn)",
    ),
  factor: real.describe("how far they are stretched: about how many times longer sequences become"),
  original_seq: count.optional().describe("llama3, yarn: tokens of the sequences before stretching; default: model.seq"),
  low_freq: real.default(1).describe("llama3: up to so many turns within original_seq a wavelength is stretched by the whole factor"),
  high_freq: real.default(4).describe("llama3: from so many turns on it is left alone"),
  beta_fast: real.default(32).describe("yarn: from so many turns on a wavelength is left alone"),
  beta_slow: real.default(1).describe("yarn: up to so many turns it is stretched by the whole factor"),
  mscale: real.nullable().default(null).describe("yarn: with mscale_all_dim, what attention_factor is derived from"),
  mscale_all_dim: real
    .nullable()
    .default(null)
    .describe(
      "yarn: with mscale, what attention_factor is derived from; with mla, the scores too grow by (0.1 x mscale_all_dim x ln factor + 1) squared",
    ),
  attention_factor: real
    .nullable()
    .default(null)
    .describe(
      "yarn: by what turned queries and keys are multiplied; null = 0.1 x ln factor + 1, or with mscale and mscale_all_dim (0.1 x mscale x ln factor + 1) / (0.1 x mscale_all_dim x ln factor + 1)",
    ),
});

const RopeText = z.strictObject({
  theta: real.default(1e4).describe("base of the rotary position embedding's wavelengths"),
  interleaved: z
    .boolean()
    .default(false)
    .describe("which channels turn together: neighbours (DeepSeek), or one of each half of the head (most others)"),
  scaling: RopeScalingText.nullable().default(null).describe("wavelengths stretched for longer sequences; null = as they are"),
});

const Mla = z.strictObject({
  q_rank: count
    .nullable()
    .default(null)
    .describe("width of the latent that all queries are made from; null = made from the residual stream"),
  kv_rank: count.describe("width of the latent that the keys and values of all heads are made from"),
  nope_dim: count.describe("channels of a query or key head that positions do not turn"),
  rope_dim: count.describe("channels after them that positions turn; the keys of all heads share theirs"),
  v_dim: count.describe("width of one value head"),
  norm_eps: real
    .default(1e-6)
    .describe("added to the mean square of a latent under the root; not norm.eps: DeepSeek's models have 1e-6 here whatever that is"),
});

const Dropout = z.strictObject({
  attention: real
    .default(0)
    .describe(
      "probability that a weight of attention counts as 0 (what is kept grows by 1 / (1 - p)); on H100 and H200, attention is slower with it",
    ),
  hidden: real
    .default(0)
    .describe("the same of each element that attention or the feed-forward part adds to the residual stream, and of the embedding"),
});

const Balance = z.enum(["none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile"]);
export type Balance = z.infer<typeof Balance>;

const RouterText = z.strictObject({
  type: z
    .enum(["top_k", "expert_choice"])
    .default("top_k")
    .describe(
      "who chooses: each token its top_k experts, or each expert its best tokens of a microbatch, as many as even loads would bring",
    ),
  score: z
    .enum(["softmax", "sigmoid", "sqrt_softplus"])
    .default("softmax")
    .describe("how logits become scores: over all experts together, or each by itself: sigmoid, or the root of softplus"),
  normalize_top_k: z
    .boolean()
    .default(true)
    .describe(
      "divide the chosen scores by their sum (Mixtral does, OLMoE does not); with softmax, experts are then chosen by their logits, else by their scores",
    ),
  scaling: real.default(1).describe("factor on the weights of the chosen experts (DeepSeek-V3: 2.5)"),
  precision: z
    .enum(["model", "fp32"])
    .default("model")
    .describe("what the logits are kept in, and their gradients: as the rest of the model, or in fp32"),
  jitter: real
    .nullable()
    .default(null)
    .describe("eps: what the router sees is multiplied, element by element, by a random number from 1 - eps to 1 + eps; null = it is not"),
  groups: count
    .default(1)
    .describe("groups of neighbouring experts; a token's experts come from group_top_k of them, which bounds how far it travels"),
  group_top_k: count.optional().describe("groups that a token may use; default: all"),
  group_scores: count
    .optional()
    .describe(
      "a group is worth the sum of so many of its largest scores (DeepSeek-V2: 1, V3: 2); default: top_k / group_top_k, rounded down, as in Megatron Core",
    ),
  expert_bias: z
    .boolean()
    .default(false)
    .describe("choose by score + a bias per expert, which after each step moves towards even loads (DeepSeek-V3); weights stay unbiased"),
  bias_rate: real.default(1e-3).describe("how far the bias moves in a step"),
  balance: z
    .union([Balance, z.array(Balance).min(1)])
    .default("aux_loss")
    .describe(
      "what keeps tokens spread over the experts, one or several: a loss on the counts of each microbatch, of each sequence, or of all data ranks and the step's microbatches so far; or choices that are even by themselves: Sinkhorn's method, or biases that are quantiles of the logits",
    ),
  aux_coeff: z
    .union([real, z.array(real)])
    .default(0)
    .describe(
      "weight of the balancing loss; of several, a list. The default is 0, as in Megatron Core, so that a moved job trains the same; with 0 nothing balances, and a rule warns",
    ),
  quantile_ema: real.default(0).describe("with balance: quantile, how much of a bias stays after a step"),
  z_coeff: factor
    .default(0)
    .describe("weight of the loss on the squared log-sum-exp of the router's logits, which keeps them small; 0 = none"),
  force: z
    .enum(["none", "uniform"])
    .default("none")
    .describe("for benchmarks. uniform: tokens go to the experts in turns, whatever the scores, and weigh as these say"),
});

const Capacity = z.strictObject({
  factor: real.describe("room of an expert, as a multiple of its share of the tokens that one rank routes at once"),
  drop: z
    .enum(["probs", "position"])
    .default("probs")
    .describe("what is kept where more want in: the largest weights, or the first positions (in Megatron Core position keeps any)"),
  pad: z.boolean().default(false).describe("fill what room is left, so that every expert gets the same number of rows"),
});

const Shared = z.strictObject({
  ffn: count.describe("inner width of the shared experts, all of them together"),
  gate: z
    .boolean()
    .default(false)
    .describe("weigh what they say by a gate of the token (Qwen2-MoE): the sigmoid of its product with a vector"),
});

const SomeLayers = z.strictObject({
  first_dense: z.int().min(0).default(0).describe("so many layers from the first on are dense (DeepSeek)"),
  every: count.default(1).describe("of the others, those whose number (from 0) is a multiple of it have experts"),
});

const MoeText = z.strictObject({
  experts: count.max(65536).describe("experts in each layer"),
  top_k: count.describe("experts that each token is sent to"),
  ffn: count.optional().describe("inner width of one expert; default: model.ffn"),
  layers: z
    .union([z.literal("all"), SomeLayers, z.array(z.int().min(0).max(1)).max(LAYERS)])
    .default("all")
    .describe("which layers have experts; the others are dense, of width model.ffn. A list says 1 or 0 for each layer"),
  shared: Shared.nullable().default(null).describe("experts that every token goes to, beside those it chooses: a dense part of its own"),
  latent: count
    .nullable()
    .default(null)
    .describe("the routed experts work in this width: tokens are projected to it before they travel, and back after; null = model.hidden"),
  router: RouterText.prefault({}).describe("how tokens choose experts"),
  dispatch: z
    .enum(["all_to_all", "all_gather"])
    .default("all_to_all")
    .describe("how rows reach the ranks that hold their experts: each row to its experts, or every row to every rank of the expert group"),
  capacity: z
    .union([z.literal("dropless"), Capacity])
    .default("dropless")
    .describe("dropless: every routed row is computed; or a limit, beyond which rows are dropped"),
  rows_bound: z
    .union([z.literal("worst"), real.min(1)])
    .default("worst")
    .describe(
      "rows an expert-parallel rank has memory for, as a multiple of the balanced load; 'worst' is the most that routing can send, and never overflows",
    ),
});

const Mtp = z.strictObject({
  layers: count
    .max(DEPTHS)
    .describe("how many tokens after the next are predicted, too: each by a layer of its own, from what the one before it made"),
  coeff: factor.default(0.1).describe("weight of the mean of these losses, beside the loss (DeepSeek-V3: 0.3, then 0.1)"),
});

const ModelText = z.strictObject({
  layers: count.max(LAYERS).describe("transformer layers"),
  hidden: count.describe("width of the residual stream"),
  ffn: count
    .optional()
    .describe(
      "inner width of the dense feed-forward part; default: 8/3 x hidden, down to a multiple of 64 (what SwiGLU takes to have the parameters of 4 x hidden)",
    ),
  heads: count.describe("query heads"),
  kv_heads: count.optional().describe("key and value heads, each shared by heads / kv_heads query heads; default: heads"),
  head_dim: count.optional().describe("width of one head; default: hidden / heads, or with mla nope_dim + rope_dim"),
  mla: Mla.nullable()
    .default(null)
    .describe(
      "latent attention (DeepSeek): keys and values of all heads are made from one narrow vector a token; null = attention as usual",
    ),
  qkv_bias: z.boolean().default(false).describe("queries, keys and values have biases"),
  out_bias: z.boolean().default(false).describe("the product after attention has a bias"),
  vocab: count.describe("rows of the embedding and of the head; token ids are below it"),
  seq: count.describe("tokens in one sequence"),
  norm: Norm.prefault({}).describe("normalisation"),
  rope: RopeText.prefault({}).describe("rotary position embedding"),
  activation: z
    .enum(["swiglu", "geglu"])
    .default("swiglu")
    .describe(
      "activation of the feed-forward part and of experts: silu(gate) x up, or gelu(gate) x up with the tanh approximation of gelu",
    ),
  tie_embeddings: z.boolean().default(false).describe("the head uses the embedding's weights"),
  qk_norm: z
    .enum(["none", "head", "full"])
    .default("none")
    .describe("normalise queries and keys: each head by itself, or all heads together (OLMoE)"),
  dropout: Dropout.prefault({}).describe("what training leaves out at random; the same bits on any mesh"),
  moe: MoeText.nullable().default(null).describe("mixture of experts in place of the dense feed-forward part; null = dense"),
  mtp: Mtp.nullable()
    .default(null)
    .describe(
      "multi-token prediction (DeepSeek-V3): further layers, of the kind of the last one, that see the tokens to come; null = none",
    ),
});

export const ParallelText = z.strictObject({
  world: count
    .max(2 ** 20)
    .default(1)
    .describe("ranks in all; one rank is one process and one GPU"),
  tensor: count.default(1).describe("ranks that share one layer's attention and dense matrices"),
  sequence: z
    .boolean()
    .default(false)
    .describe("between matrices, cut activations along the sequence over the tensor ranks instead of repeating them"),
  pipeline: count.default(1).describe("pipeline stages"),
  virtual_pipeline: count
    .default(1)
    .describe(
      "chunks of layers in each stage (interleaved 1F1B): a smaller bubble for more transfers and memory; layers are split evenly over all chunks",
    ),
  layout: z
    .string()
    .max(10_000)
    .nullable()
    .default(null)
    .describe(
      "which layers stand where, in place of an even split: E the embedding, t a layer, m one of model.mtp, L the head and the loss, | between (virtual) stages, which may be empty, ( ) a group, *n repeats, commas mean nothing; Et*3|(tt|)*29,m|L",
    ),
  schedule: z
    .enum(["1f1b", "zero_bubble"])
    .default("1f1b")
    .describe("the order of microbatches on a stage; zero_bubble makes the gradients of weights later, in the gaps"),
  expert: count.default(1).describe("ranks over which the experts of a layer are spread"),
  expert_tensor: count
    .default(1)
    .describe("ranks that share the matrices of one expert; not taken from tensor: whole experts are the usual choice"),
  context: count
    .max(CONTEXT)
    .default(1)
    .describe(
      "ranks that share the tokens of one sequence; each has one piece of its first half and the mirrored one of its second, so that causal attention is equal work",
    ),
  context_method: z
    .enum(["ring", "all_gather"])
    .default("ring")
    .describe("how a rank comes to see the keys and values of others: a piece at a time from its neighbour, or all at once"),
  data: count
    .optional()
    .describe("replicas that see different sequences; derived: world / (tensor x pipeline x context). If written, it must agree"),
  distributed_optimizer: z.boolean().default(false).describe("each data rank keeps and updates its share of master weights and moments"),
  optimizer_instances: count
    .default(1)
    .describe(
      "with the distributed optimizer: shares are kept this many times over, each by neighbouring data ranks; gradients are summed over the copies",
    ),
  order: z
    .enum(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])
    .default("tp-cp-ep-dp-pp")
    .describe("how ranks are numbered, the first axis fastest: pipeline stages outermost, or data replicas"),
});

const Muon = z.strictObject({
  momentum: real.default(0.95).describe("weight of the past in the running mean of gradients"),
  nesterov: z.boolean().default(true).describe("the update looks one step ahead: the mean once more toward the gradient"),
  scale_mode: z
    .enum(["spectral", "unit_rms_norm", "shape_scaling"])
    .default("spectral")
    .describe(
      "the factor on the update of a matrix [in, out], as in Megatron Core: the root of max(in, out), of out / in, or of max(1, out / in)",
    ),
  extra_scale_factor: real
    .default(0.2)
    .describe(
      "a further factor on the update; 0.2 with spectral makes it as large as one of adamw (Moonlight), so lr and weight_decay carry over",
    ),
});

const OptimizerText = z.strictObject({
  type: z
    .enum(["adamw", "adam", "sgd", "muon"])
    .default("adamw")
    .describe(
      "adamw: weight decay shrinks the weights themselves; adam, sgd: it adds to their gradients, as L2 regularisation does; muon: orthogonal updates of hidden matrices (also of each expert and of routers), adamw for embeddings, output head, gains and biases",
    ),
  muon: Muon.optional().describe("muon: its options; betas and eps are those of adamw for the other parameters"),
  lr: real.describe("the largest learning rate, reached after warm-up"),
  min_lr: real.default(0).describe("the learning rate at the end of the decay and after it"),
  warmup_steps: real
    .min(0)
    .default(0)
    .describe("steps in which the learning rate rises linearly from warmup_init; where the batch grows, of global_batch sequences each"),
  warmup_init: real.default(0).describe("the learning rate at the beginning of the warm-up"),
  decay_steps: real
    .min(0)
    .optional()
    .describe("the step after which the learning rate is min_lr, warm-up included, counted as warmup_steps; default: the whole run"),
  schedule: z
    .enum(["constant", "linear", "cosine", "inverse_square_root", "wsd"])
    .default("constant")
    .describe("the shape of the decay after warm-up; wsd: constant, then a fall over the last wsd_decay_steps"),
  wsd_decay_steps: real.min(0).nullable().default(null).describe("wsd: length of the fall, which ends at decay_steps"),
  wsd_decay: z.enum(["exponential", "linear", "cosine", "minus_sqrt"]).default("exponential").describe("wsd: the shape of the fall"),
  betas: z
    .tuple([real, real])
    .default([0.9, 0.95])
    .describe("adamw, adam, and adamw beside muon: decay of the first and of the second moment"),
  eps: real.default(1e-8).describe("adamw, adam: added to the root of the second moment"),
  momentum: real.default(0.9).describe("sgd: how much of the step before stays; 0 = none, and no memory for it"),
  weight_decay: real.default(0.1).describe("weight decay, of parameters with two or more dims"),
  weight_decay_schedule: z
    .enum(["constant", "linear", "cosine"])
    .default("constant")
    .describe("how weight decay goes over the run: constant at weight_decay, or from weight_decay_start to weight_decay_end"),
  weight_decay_start: real.nullable().default(null).describe("weight decay of the first step, where it changes"),
  weight_decay_end: real.nullable().default(null).describe("weight decay at the end of the run, where it changes"),
  clip: real.default(1.0).describe("largest global norm of the gradient; 0 = no clipping"),
});

const BatchRampup = z.strictObject({
  start: count.describe("sequences of the first step"),
  increment: count.describe("by how many sequences the batch grows at once"),
  samples: count.describe("sequences over which it grows, by steps equally far apart, to global_batch"),
});

const DynamicLossScale = z.strictObject({
  initial: real.default(2 ** 32).describe("the first scale"),
  growth: real.default(2).describe("factor by which it grows"),
  growth_interval: count.default(1000).describe("steps in a row without overflow after which it grows"),
  backoff: real.default(0.5).describe("factor by which it shrinks after an overflow"),
  hysteresis: count.default(2).describe("overflows until it shrinks, once; from then on, until it grows again, each overflow shrinks it"),
  min: real.default(1).describe("the smallest scale"),
});

const Module = z.enum(["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]);

const Recompute = z.strictObject({
  mode: z
    .enum(["none", "selective", "full"])
    .default("none")
    .describe("activations that backward makes again instead of keeping them: of named modules, or of whole layers"),
  modules: z
    .array(Module)
    .min(1)
    .max(Module.options.length)
    .default(["core_attn"])
    .describe("mode selective: which modules, by the names that Megatron Core gives them"),
  method: z
    .enum(["uniform", "block"])
    .default("uniform")
    .describe(
      "mode full. uniform: all layers, keeping what enters every `layers`-th of them; block: the first `layers` of each stage or chunk",
    ),
  layers: count.default(1).describe("mode full: layers of a group (uniform), or how many (block)"),
});

const TrainText = z.strictObject({
  micro_batch: count.default(1).describe("sequences in one forward and backward of one data rank"),
  global_batch: count.optional().describe("sequences in one optimizer step over all data ranks; default: micro_batch x data"),
  steps: count.describe("optimizer steps"),
  batch_rampup: BatchRampup.nullable()
    .default(null)
    .describe("the batch begins smaller and grows to global_batch; null = it is global_batch from the first step on"),
  loss_weighting: z
    .enum(["microbatch", "token"])
    .default("microbatch")
    .describe(
      "where data.labels ignores some tokens, what the loss is a mean of: means of each microbatch, which count alike; or all labels of a step, which count alike. With token, balancing and z losses are multiplied by tokens / labels of the step, as in Megatron Core: with 10 % of the tokens labelled they weigh 10 times as much beside the loss. A step without labels has no weight at all",
    ),
  precision: z
    .enum(["fp32", "bf16", "fp16"])
    .default("bf16")
    .describe("bf16, fp16: parameters and activations in 16 bits, sums, main gradients and optimizer in fp32"),
  loss_scale: z
    .union([real, DynamicLossScale])
    .nullable()
    .default(null)
    .describe(
      "fp16: by what the loss is multiplied before backward, so that small gradients do not vanish; a step that overflows is left out, and after 4 in a row at a scale that cannot shrink the run ends. A number stays as it is, a section adapts itself; default with fp16: a section of defaults",
    ),
  on_nonfinite: z
    .enum(["stop", "skip"])
    .default("stop")
    .describe(
      "a step whose loss or gradient norm is not finite changes no weights. stop: the run then ends with an error, and saves no checkpoint of the step; skip: it goes on, and counts such steps. In fp16, gradients that overflow by the loss scale are left out either way",
    ),
  recompute: Recompute.prefault({}).describe("what backward computes again, to save memory"),
  seed: z.int().min(0).default(1234).describe("seed of the initial weights, of the shuffle, and of dropout and jitter"),
  init_std: factor.default(0.02).describe("standard deviation of the initial weights"),
  optimizer: OptimizerText.describe("optimizer and learning-rate schedule"),
});

const SourceText = z.strictObject({
  path: z.string().min(1).describe("the prefix of the data set, PREFIX of PREFIX.bin and PREFIX.idx, relative to the job file"),
  weight: z.number().min(1e-6).max(1e9).default(1).describe("how many of the samples come from this source, beside the other weights"),
});

const DataText = z.strictObject({
  path: z.string().optional().describe("the training text, or its token ids, relative to the job file; not with sources"),
  sources: z
    .array(SourceText)
    .min(1)
    .optional()
    .describe(
      "in place of path: data sets in Megatron's indexed format, blended by weight. Documents come in a random order for each epoch, samples run across their ends and are shuffled, as in Megatron Core; rankc data prepare writes such data sets",
    ),
  split: z
    .array(z.number().min(0).max(1e9))
    .min(1)
    .max(3)
    .optional()
    .describe("with sources: shares of training, validation and test, such as [99990, 8, 2]; training takes the documents of the first"),
  format: z
    .enum(["text", "tokens"])
    .optional()
    .describe("what path holds: a text, or token ids as a tokenizer made them, one after the other; default: tokens where it ends in .bin"),
  dtype: z
    .enum(["u16", "u32"])
    .optional()
    .describe(
      "of format tokens: the type of each id, little-endian; default: u16 where all ids below model.vocab fit in it. The index of a Megatron data set, PREFIX.idx beside PREFIX.bin, takes precedence",
    ),
  labels: z
    .string()
    .nullable()
    .default(null)
    .describe(
      "a file with an i32 for each token of path, little-endian: the id to be predicted where that token stands, most often the token itself, or -100 where nothing is to be learnt; null = every token is learnt",
    ),
  tokenizer: z.literal("bytes").default("bytes").describe("of format text: each byte of the text is one token id, 0 to 255"),
  order: z
    .enum(["sequential", "shuffled"])
    .default("sequential")
    .describe("walk through the text from its start, or draw seeded random places"),
});

const ClusterText = z.strictObject({
  nodes: count.optional().describe("hosts; default: as many as world needs"),
  gpus_per_node: count.default(8).describe("GPUs in one host, joined by the fast links"),
  device: z.enum(deviceNames).default("h100-80gb").describe("the GPU: its memory, peak and bandwidth are looked up"),
});

/** The job as written. */
export const JobText = z.strictObject({
  name: z.string().min(1).describe("what the job is called in reports"),
  model: ModelText.describe("the transformer"),
  parallel: ParallelText.prefault({}).describe("how the model and the batch are spread over the ranks"),
  train: TrainText.describe("batch, precision and optimizer"),
  data: DataText.describe("what to train on"),
  cluster: ClusterText.prefault({}).describe("the machines"),
});
export type JobText = z.output<typeof JobText>;

const Moe = MoeText.required({ ffn: true }).extend({ router: RouterText.required({ group_top_k: true, group_scores: true }) });

/** The job with every default filled in. The compiler reads it, and the plan contains it. */
export const Job = JobText.extend({
  model: ModelText.required({ ffn: true, kv_heads: true, head_dim: true }).extend({
    rope: RopeText.extend({ scaling: RopeScalingText.required({ original_seq: true }).nullable() }),
    moe: Moe.nullable(),
  }),
  parallel: ParallelText.required({ data: true }),
  train: TrainText.required({ global_batch: true }).extend({ optimizer: OptimizerText.required({ decay_steps: true }) }),
  data: DataText.required({ path: true, format: true, dtype: true }),
  cluster: ClusterText.required({ nodes: true }),
});
export type Job = z.output<typeof Job>;

/** Fills in defaults that depend on other keys. A quotient may be fractional here; a rule reports that before the job is compiled. */
export function completeJob(text: JobText): Job {
  const { model, parallel, train, cluster, data: corpus } = text;
  const { mla } = model;
  const { scaling } = model.rope;
  const path = corpus.path ?? corpus.sources?.[0]?.path ?? "";
  const ffn = model.ffn ?? Math.max(64, Math.floor((8 * model.hidden) / 3 / 64) * 64);
  const data = parallel.data ?? parallel.world / (parallel.tensor * parallel.pipeline * parallel.context);
  return {
    ...text,
    model: {
      ...model,
      ffn,
      kv_heads: model.kv_heads ?? model.heads,
      head_dim: model.head_dim ?? (mla ? mla.nope_dim + mla.rope_dim : model.hidden / model.heads),
      rope: { ...model.rope, scaling: scaling && { ...scaling, original_seq: scaling.original_seq ?? model.seq } },
      moe: model.moe && completeMoe(model.moe, ffn),
    },
    parallel: { ...parallel, data },
    train: completeTrain({ ...train, global_batch: train.global_batch ?? train.micro_batch * data }),
    data: {
      ...corpus,
      // with sources, the first of them stands for all where one path is shown
      path,
      format: corpus.format ?? (corpus.sources || path.endsWith(".bin") ? "tokens" : "text"),
      dtype: corpus.dtype ?? (model.vocab <= 2 ** 16 ? "u16" : "u32"),
    },
    cluster: { ...cluster, nodes: cluster.nodes ?? Math.ceil(parallel.world / cluster.gpus_per_node) },
  };
}

function completeTrain(train: Omit<Job["train"], "optimizer"> & Pick<JobText["train"], "optimizer">): Job["train"] {
  return {
    ...train,
    loss_scale: train.precision === "fp16" ? (train.loss_scale ?? DynamicLossScale.parse({})) : train.loss_scale,
    optimizer: {
      ...train.optimizer,
      ...(train.optimizer.type === "muon" && { muon: train.optimizer.muon ?? Muon.parse({}) }),
      decay_steps: train.optimizer.decay_steps ?? lengthOf(train),
    },
  };
}

function completeMoe(moe: z.output<typeof MoeText>, ffn: number): z.output<typeof Moe> {
  const { router } = moe;
  const groupTopK = router.group_top_k ?? router.groups;
  const groupScores = router.group_scores ?? Math.max(1, Math.floor(moe.top_k / groupTopK));
  return { ...moe, ffn: moe.ffn ?? ffn, router: { ...router, group_top_k: groupTopK, group_scores: groupScores } };
}

/** Returns whether a layer has experts. */
export function hasExperts({ moe }: Pick<Job["model"], "moe">, layer: number): boolean {
  if (moe === null || moe.layers === "all") return moe !== null;
  if (Array.isArray(moe.layers)) return moe.layers[layer] === 1;
  return layer >= moe.layers.first_dense && layer % moe.layers.every === 0;
}

/** Returns the number of layers with experts, including depths of multi-token prediction, which are of the last layer's kind. */
export function expertLayersOf(model: Pick<Job["model"], "moe" | "mtp" | "layers">): number {
  const own = Array.from({ length: model.layers }, (_, layer) => layer).filter((layer) => hasExperts(model, layer)).length;
  return own + (hasExperts(model, model.layers - 1) ? depthsOf(model) : 0);
}

/** Returns the JSON Schema of a job file, for editors. */
export function jobSchema(): Record<string, unknown> {
  return { title: "rankc job", ...z.toJSONSchema(JobText, { target: "draft-07", io: "input" }) };
}

type Router = NonNullable<Job["model"]["moe"]>["router"];
/** Returns the balancing methods with their weights. Lists of different lengths are cut to the shorter one. */
export function balancesOf({ balance, aux_coeff }: Router): readonly { readonly by: Balance; readonly coeff: number }[] {
  const by = Array.isArray(balance) ? balance : [balance];
  const coeffs = Array.isArray(aux_coeff) ? aux_coeff : [aux_coeff];
  return by.slice(0, coeffs.length).map((b, i) => ({ by: b, coeff: coeffs[i]! }));
}
/** Returns the balancing method that changes the choice of experts instead of adding a loss; undefined if there is none. */
export const evenBy = ({ balance }: Router): "sinkhorn" | "quantile" | undefined =>
  [balance].flat().find((by): by is "sinkhorn" | "quantile" => by === "sinkhorn" || by === "quantile");
