/**
 * The schema of plans, the files that the compiler writes and the runtime reads. A plan has one program per pipeline stage, not per
 * rank. It is a function of the job and the version of rankc. Ids are stable names, so that two plans can be compared.
 */
import { z } from "zod";
import { Job } from "./job.ts";
import { count, DtypeText, id, Kernel } from "./kernel.ts";
import { gridAxisNames } from "./meshAxes.ts";
import { opNames } from "./opNames.ts";

export { Arg, Kernel, Launch, TensorMap } from "./kernel.ts";

const subAxes = z.array(count).describe("indices into mesh.subAxes, outermost first");

const Factor = z
  .strictObject({ stride: count, size: count })
  .describe("the coordinate of a rank is floor(number within its stage / stride) % size");

/** Axes of the two grids of a mesh; kv and copies split tp by key/value heads. */
export const MeshAxis = z.enum([...gridAxisNames, "pp"]);
/** A value of the schema `MeshAxis`. */
export type MeshAxis = z.infer<typeof MeshAxis>;

/** The mesh: ranks, sub-axes, and the axes of both grids as products of them. */
export const MeshText = z.strictObject({
  world: count,
  per_stage: count.describe("ranks in one pipeline stage"),
  stage_stride: count.describe(
    "ranks of one stage that stand side by side: all of them where stages are the outermost axis; else those up to the first of the next stage",
  ),
  subAxes: z
    .array(Factor)
    .describe(
      "both grids are products of these, smallest stride first; where their strides do not nest, the dense grid of the first, the expert grid of the rest",
    ),
  axes: z
    .record(MeshAxis.exclude(["pp"]), z.array(count))
    .describe(
      "the sub-axes of tp, cp, dp (dense grid) and etp, ep, edp (expert grid); kv: those of tp between ranks with different key/value heads; copies: those of tp between ranks with copies of one head",
    ),
  sizes: z.record(MeshAxis, count).describe("ranks along each axis"),
  gpus_per_node: count,
});

/** The arena of a buffer. Activations have one copy per microbatch in flight; all blocks share the workspace. */
export const BufferKind = z.enum(["parameter", "gradient", "optimizer", "activation", "workspace"]);
/** A value of the schema `BufferKind`. */
export type BufferKind = z.infer<typeof BufferKind>;

/** A buffer of a program: kind, local and global sizes, sharding, type. */
export const Buffer = z.strictObject({
  id,
  kind: BufferKind,
  dtype: DtypeText,
  shape: z.array(count).describe("local sizes in memory; for rows: the bound, then the rest"),
  sizes: z.array(count).describe("global sizes, one per dim; a ragged value has its ragged dims first"),
  ragged: count.describe("leading dims that share the first dim in memory: 3 for rows B~S~E, else 0"),
  fanout: count
    .optional()
    .describe("rows of a ragged value per token at most: the router's top_k, or all experts where these choose or are padded"),
  meanFanout: z
    .number()
    .optional()
    .describe(
      "mean number of rows of a ragged value per token under balanced routing, if it is not fanout: the ranks that a token is sent to",
    ),
  quota: z
    .strictObject({ rows: count, sequences: count, positions: count })
    .optional()
    .describe("… and per expert at most `rows` of any group of so many sequences and positions: its capacity"),
  shardedBy: z.array(subAxes).describe("per dim, the sub-axes that shard it"),
  partial: z.array(count).optional().describe("sub-axes over which a sum (or maximum) is pending"),
  chunk: count.optional().describe("kind activation, not in the first chunk: the chunk whose copies it belongs to"),
  layer: count.optional().describe("the layer of the model that it belongs to; its id then has a part layers.N"),
  within: id.optional().describe("shares the first bytes of this buffer, which is dead once this one is made: a reduction in place"),
  part: z
    .strictObject({ of: id, at: count.describe("the first element within it") })
    .optional()
    .describe("elements of another buffer, one after another: it has no memory of its own"),
  rows: id.optional().describe("for rows: the index buffer [1 + 3*bound] i32 (count, then b,s,e of each row)"),
});
/** A value of the schema `Buffer`. */
export type Buffer = z.infer<typeof Buffer>;

const Why = z.strictObject({
  op: z.string().describe("the use that made it necessary"),
  because: z.string(),
  path: z.string().describe("the job key that decided it"),
  layer: count.optional().describe("the layer of that use"),
});

/** The names of the streams of asynchronous collectives, by what they carry. */
export const StreamName = z.enum(["gradients", "parameters", "experts", "tensor"]);
/** A value of the schema `StreamName`. */
export type StreamName = z.infer<typeof StreamName>;

/** The keys of an instruction that say when it runs. */
const ordering = {
  waits: z
    .array(id)
    .min(1)
    .optional()
    .describe("asynchronous collectives that must have ended before this begins; all of them end with the step"),
  only: z
    .enum(["first", "last", "logged"])
    .optional()
    .describe(
      "first, last: runs for this microbatch of a step, or of a batch of an evaluation, only; logged: in steps only whose numbers are logged",
    ),
};

/** An op on local buffers. */
export const Compute = z.strictObject({
  kind: z.literal("compute"),
  id,
  ...ordering,
  op: z.enum(opNames),
  kernel: id.describe("the kernel that computes it"),
  reads: z.record(z.string(), id),
  writes: z.record(z.string(), id),
  dims: z
    .record(z.string(), z.tuple([count, subAxes]))
    .describe("global size of each dim that the signature names, and the sub-axes that shard it"),
  attrs: z.record(z.string(), z.number()),
  tensors: count
    .min(2)
    .optional()
    .describe(
      "the number of tensors that the op runs for. Operands that its signature writes `...` have a buffer for each: `name` of the first tensor, `name.1` of the second and so on; the tensors share all other operands",
    ),
  ringOffset: z
    .record(z.string(), count)
    .optional()
    .describe(
      "dims of which this rank processes the block of another rank: the one so many places before it along the sub-axes of the dim",
    ),
  blocks: z
    .array(z.strictObject({ subAxis: count, stride: count }))
    .optional()
    .describe(
      "the input has a block for each rank along these sub-axes, and a rank reads its own: it begins at the sum of coordinate * stride, in elements",
    ),
  accumulates: z.array(z.string()).optional().describe("outputs that are added to or updated in place"),
  first_kernel: id
    .optional()
    .describe("the kernel for the first microbatch of a step: it writes the outputs that `kernel` adds to, so they need no zeros"),
  rows: id.optional().describe("the index buffer that this op writes (permute, pack)"),
  rows_of: z.string().optional().describe("the operand whose rows the op computes on, where it reads rows of several indices"),
});
/** A value of the schema `Compute`. */
export type Compute = z.infer<typeof Compute>;

/** The collectives that the lowering emits. */
export const CollectiveKind = z.enum(["reduce_scatter", "all_to_all", "all_gather", "all_reduce", "all_reduce_max", "shift"]);
/** A value of the schema `CollectiveKind`. */
export type CollectiveKind = z.infer<typeof CollectiveKind>;
/** One collective on contiguous buffers; `Comm` in runtime/backend.ts documents each kind. */
export const Collective = z.strictObject({
  kind: z.literal("collective"),
  id,
  ...ordering,
  stream: StreamName.optional().describe(
    "asynchronous: it begins after the instructions before it and after the collectives before it on this stream, and runs beside the instructions after it until one waits for it",
  ),
  how: CollectiveKind,
  name: z.string().describe("what people call it: dispatch, combine, or as `how`"),
  axes: z.string().describe("the axes it runs over, as people name them: tp, ep, dp*cp"),
  subAxes: z.array(count),
  world: z.boolean().optional().describe("over all ranks of all stages"),
  from: id,
  to: id,
  more: z
    .array(z.strictObject({ from: id, to: id }))
    .min(1)
    .optional()
    .describe("further pairs of buffers that the same launch exchanges, each in the same way: the tensors of a bucket"),
  bytes: count.describe("bytes each rank sends, ring algorithms; lists of rows at their full capacity"),
  why: Why,
});
/** A value of the schema `Collective`. */
export type Collective = z.infer<typeof Collective>;

/** A send or receive between two stages. */
export const Transfer = z.strictObject({
  kind: z.enum(["send", "recv"]),
  id,
  ...ordering,
  buffer: id,
  tag: id.describe("what is sent: the same on both sides"),
  peer: count.describe("the other stage; the rank with the same number within it"),
  channel: z.string().describe("what goes from one stage to another by one channel is received in the order in which it was sent"),
  bytes: count,
  in_flight: count.min(2).optional().describe("of a send: how many messages may be sent before the first is received; 1 if absent"),
  why: Why,
});
/** A value of the schema `Transfer`. */
export type Transfer = z.infer<typeof Transfer>;

/** One instruction of a program. */
export const Instruction = z.discriminatedUnion("kind", [Compute, Collective, Transfer]).meta({ id: "Instruction" });
/** A value of the schema `Instruction`. */
export type Instruction = z.infer<typeof Instruction>;

/** A parameter of a stage: its buffer and its initial values. */
export const Parameter = z.strictObject({
  name: id,
  init: z.strictObject({ type: z.enum(["normal", "ones", "zeros"]), std: z.number() }),
  rule: z
    .enum(["adamw", "adam", "sgd", "muon", "expert_bias", "quantile"])
    .describe(
      "how a step changes it; the bias of a router's choice has no gradient: it goes by how many tokens each expert got, or by quantiles of its logits",
    ),
  buffer: id,
  gradient: id.describe("the reduced gradient, as it lies when the optimizer reads it; or what stands in its place"),
  master: id.describe("the f32 copy the optimizer updates; the parameter itself where both are one"),
  tied_to: id.optional().describe("the parameter (of another stage) this one is a copy of"),
});
/** A value of the schema `Parameter`. */
export type Parameter = z.infer<typeof Parameter>;

/** What the host writes to an input of a program. */
export const InputSource = z
  .enum([
    "ids",
    "labels",
    "weights",
    "documents",
    "positions",
    "sources",
    "sample",
    "one",
    "mtp_coeff",
    "aux_weight",
    "lr",
    "step",
    "weight_decay",
    "loss_scale",
  ])
  .describe(
    "per microbatch, one element a token: ids, labels, weights (of the losses of tokens), positions (in the sequence), documents (the position in its sequence at which the document of a token begins), sources (of an evaluation: the number of the source of the token); one a sequence: sample (its number since the run began); scalars: one, mtp_coeff, aux_weight (gradients of the losses). Per step, scalars: lr, step, weight_decay, loss_scale",
  );
/** A value of the schema `InputSource`. */
export type InputSource = z.infer<typeof InputSource>;
const source = {
  source: InputSource,
  depth: count
    .min(1)
    .optional()
    .describe("of ids, labels and weights: the depth of multi-token prediction, whose tokens are shifted by it"),
};
/** The source of an input, without its buffer. */
export const HostInput = z.strictObject(source);
/** A value of the schema `HostInput`. */
export type HostInput = z.infer<typeof HostInput>;

/** Consecutive layers of a stage; with virtual pipelining a stage has several chunks. */
export const Chunk = z.strictObject({
  layers: z.tuple([count, count]).describe("first layer, and one past the last"),
  copies: count.describe("microbatches in flight at most: copies of its activations"),
  forward: z.array(Instruction),
  backward: z.array(Instruction),
  weights: z.array(Instruction).describe("gradients of weights, where they are made apart from those of inputs"),
});
/** A value of the schema `Chunk`. */
export type Chunk = z.infer<typeof Chunk>;

/** One block for one microbatch. */
export const BlockRun = z.strictObject({
  kind: z.enum(["forward", "backward", "weights"]),
  microbatch: count,
  chunk: count,
  paired: z
    .literal(true)
    .optional()
    .describe("of a forward: its instructions alternate with those of the next block run, the backward of an earlier microbatch"),
});
/** A value of the schema `BlockRun`. */
export type BlockRun = z.infer<typeof BlockRun>;

/** How the instructions of a forward and of the backward of an earlier microbatch alternate. */
export const Pair = z.strictObject({
  forward: count.describe("the chunk of the forward"),
  backward: count.describe("the chunk of the backward"),
  turns: z
    .array(count)
    .describe(
      "how many instructions follow one another: of the forward, of the backward, of the forward again, and so on; each keeps its order",
    ),
});
/** A value of the schema `Pair`. */
export type Pair = z.infer<typeof Pair>;

/** The meaning of a scalar or a table that is read after a step. */
export const MetricName = z
  .enum(["loss", "mtp_loss", "aux_loss", "z_loss", "dropped_rows", "expert_loads", "router_entropy", "grad_norm", "parameter_squares"])
  .describe(
    "scalars, except expert_loads [layers with experts, experts]: how many tokens chose each expert. parameter_squares: the sum of the squares of all weights",
  );
/** A value of the schema `MetricName`. */
export type MetricName = z.infer<typeof MetricName>;

/** The forward pass that evaluates the model on data that it is not trained on. */
const Evaluation = z.strictObject({
  chunks: z
    .array(z.array(Instruction))
    .min(1)
    .describe("per chunk, the forward block of one microbatch, without dropout and without losses of balancing"),
  step: z.array(Instruction).describe("after the last microbatch: the reduction of the losses"),
  losses: z.array(id).describe("buffers [sources] that are read after it and added up: the weighted loss of the tokens of each source"),
});

/** What may run at the same time as the collectives of a stream. */
const InOrder = z.literal("in_order");
/** A stream of asynchronous collectives. It has communicators of its own, on which collectives run one after another in the order of the plan. */
export const StreamUse = z.strictObject({
  name: StreamName,
  beside: z
    .array(z.union([StreamName, InOrder]))
    .describe("the streams whose collectives may run at the same time; in_order: collectives and transfers without a stream"),
  multiprocessors: count
    .min(1)
    .optional()
    .describe("the most that a collective of the stream occupies: thread blocks of its communicators; absent: as NCCL chooses"),
});
/** A value of the schema `StreamUse`. */
export type StreamUse = z.infer<typeof StreamUse>;

/** The program of one pipeline stage. */
export const Program = z.strictObject({
  stage: count,
  streams: z.array(StreamUse).optional().describe("the streams that asynchronous collectives use"),
  chunks: z.array(Chunk).min(1),
  order: z.array(BlockRun).describe("the block runs of a step, one after another; then the step block once"),
  pairs: z.array(Pair).min(1).optional().describe("with paired block runs: one entry for each forward and backward that are paired"),
  parameters: z.array(Parameter),
  inputs: z.array(z.strictObject({ ...source, buffer: id })).describe("buffers that the host fills"),
  bounds: z
    .array(z.strictObject({ needed: id, bound: count, of: z.enum(["rows", "rounds"]) }))
    .describe(
      "read after a step: scalars that say how much was needed of what a plan bounds: rows of experts (model.moe.rows_bound), rounds of a method",
    ),
  metrics: z
    .partialRecord(MetricName, z.array(id))
    .describe("the buffers that are read after the step block; those of one metric are added up"),
  mtp_losses: z
    .array(z.array(id))
    .optional()
    .describe("with several depths of multi-token prediction: per depth, the buffers of the metric mtp_loss that belong to it"),
  buffers: z.array(Buffer),
  step: z.array(Instruction),
  evaluation: Evaluation.optional().describe("with train.evaluation: blocks that run between steps, in the order of the forward blocks"),
});
/** A value of the schema `Program`. */
export type Program = z.infer<typeof Program>;

/** Bytes of each arena and the offset of each buffer in the arena of its kind. */
export const Memory = z.strictObject({
  stage: count,
  parameter: count,
  gradient: count,
  optimizer: count,
  activation: z.array(count).describe("of one copy, per chunk"),
  workspace: count,
  scratch: count.describe("temporary memory of kernels, which run one at a time"),
  peak: count.describe("all arenas together, activations once per copy"),
  offsets: z.record(z.string(), count),
});
/** A value of the schema `Memory`. */
export type Memory = z.infer<typeof Memory>;

const sha256 = z.string().regex(/^[0-9a-f]{64}$/);
/** The sections of a plan; each has a digest. */
export const Sections = z.strictObject({
  job: Job,
  mesh: MeshText,
  programs: z.array(Program),
  memory: z.array(Memory),
  kernels: z.array(Kernel),
  toolchain: z.strictObject({ rankc: z.string(), target: z.string() }),
});
/** A value of the schema `Sections`. */
export type Sections = z.infer<typeof Sections>;

/** A plan: all sections, the format version and the digests. */
export const Plan = Sections.extend({
  format_version: z.string().regex(/^\d+\.\d+$/),
  digests: z.strictObject({
    job: sha256,
    mesh: sha256,
    programs: sha256,
    memory: sha256,
    kernels: sha256,
    toolchain: sha256,
    plan: sha256.describe("over the six above"),
  }),
});
/** A value of the schema `Plan`. */
export type Plan = z.infer<typeof Plan>;
