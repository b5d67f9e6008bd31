/** The section parallel: the mesh, and how model and batch are spread over it. */
import { z } from "zod";
import { count } from "./numbers.ts";

/** The largest context axis. Attention of each layer has a ring step for each of its ranks, and each step is instructions of the plan. */
const MOST_CONTEXT = 256;

/** The largest number of parts of an exchange: each is instructions of the plan. */
const MOST_PARTS = 64;

/** The size of a bucket in MiB, or none. */
const bucket = z
  .union([
    z
      .number()
      .positive()
      .max(2 ** 20),
    z.literal("none"),
  ])
  .default("none");

/** parallel as written. */
export const ParallelText = z.strictObject({
  world: count
    .max(2 ** 20)
    .default(1)
    .describe("total number of ranks; a rank is one process with one GPU"),
  tensor: count.default(1).describe("ranks that share the attention and the dense matrices of a layer"),
  sequence: z
    .boolean()
    .default(false)
    .describe("shard activations between matrix products along the sequence over the tensor ranks, instead of replicating them"),
  pipeline: count.default(1).describe("pipeline stages"),
  virtual_pipeline: count
    .default(1)
    .describe(
      "chunks of layers in each stage (interleaved 1F1B): a smaller pipeline bubble for more transfers and memory; layers are split evenly over all chunks",
    ),
  layout: z
    .string()
    .max(10_000)
    .nullable()
    .default(null)
    .describe(
      "the layers of each stage, in place of an even split: E the embedding, t a layer, m a layer of model.mtp, L the head and the loss, | the border of two (virtual) stages, which may be empty, ( ) a group, *n repetition; commas are ignored; Et*3|(tt|)*29,m|L",
    ),
  schedule: z
    .enum(["1f1b", "zero_bubble"])
    .default("1f1b")
    .describe(
      "order of microbatches on a stage; zero_bubble computes gradients of weights later, while the stage would wait; chunks have the interleaved order in both",
    ),
  expert: count.default(1).describe("ranks over which the experts of a layer are spread"),
  expert_tensor: count
    .default(1)
    .describe("ranks that share the matrices of one expert; the default is not tensor, because whole experts are the usual choice"),
  context: count
    .max(MOST_CONTEXT)
    .default(1)
    .describe(
      "ranks that share the tokens of a sequence; each has a block of its first half and the mirrored block of its second half, so that causal attention costs the same on all",
    ),
  context_method: z
    .enum(["ring", "all_gather"])
    .default("ring")
    .describe(
      "how a rank receives the keys and values of the others. ring: one block after another from its neighbour; all_gather: all at once",
    ),
  data: count
    .optional()
    .describe("replicas that process different sequences; derived: world / (tensor x pipeline x context). A written value must equal it"),
  distributed_optimizer: z
    .boolean()
    .default(false)
    .describe("shard main weights and moments over the data ranks; each rank updates its shard"),
  optimizer_instances: count
    .default(1)
    .describe(
      "with the distributed optimizer: number of copies of all shards, each over neighbouring data ranks; gradients are summed over the copies",
    ),
  gradient_bucket: bucket.describe(
    "MiB of gradients that one collective reduces, beside backward of the last microbatch, as soon as it has completed them; none: each gradient by itself, after backward",
  ),
  parameter_bucket: bucket.describe(
    "with the distributed optimizer: MiB of parameters that one collective gathers, beside the updates of the parameters after them; none: each parameter by itself, after its update",
  ),
  parameter_gather: z
    .enum(["step", "forward"])
    .default("step")
    .describe(
      "when buckets of parameters are gathered. step: all in the step that updates them; forward: the first two in the step, beside the updates of the others, and these in the next forward, two buckets ahead of their use",
    ),
  expert_overlap: z
    .enum(["none", "shared", "interleave"])
    .default("none")
    .describe(
      "what runs beside the exchanges of rows between experts. shared: the shared experts, and in backward gradients of weights; interleave: these, and the instructions of another microbatch: each forward alternates with the backward of an earlier microbatch, for which one microbatch more is in memory; none: nothing, each exchange ends before the next instruction",
    ),
  tensor_overlap: z
    .union([count.min(2).max(MOST_PARTS), z.enum(["none", "backward"])])
    .default("none")
    .describe(
      "with sequence: what runs beside the all-gathers and reduce-scatters of the tensor ranks. backward: gradients of weights beside those of backward; a number: the same, and those of forward have so many parts, beside the products of other parts; none: nothing",
    ),
  communication_sms: z
    .union([count.min(1), z.literal("none")])
    .default("none")
    .describe(
      "the most multiprocessors that the collectives of one stream occupy while they run beside kernels; none: as many as NCCL chooses",
    ),
  order: z
    .enum(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])
    .default("tp-cp-ep-dp-pp")
    .describe("numbering of ranks, the fastest axis first: pipeline stages outermost, or data replicas outermost"),
});

/** parallel with every default filled in. */
export const Parallel = ParallelText.required({ data: true });

/** Fills in defaults that depend on other keys. The quotient may be fractional here; a rule reports that. */
export function completeParallel(parallel: z.output<typeof ParallelText>): z.output<typeof Parallel> {
  return { ...parallel, data: parallel.data ?? parallel.world / (parallel.tensor * parallel.pipeline * parallel.context) };
}
