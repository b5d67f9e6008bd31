/** The section train: batch, precision, recomputation and optimizer. */
import { z } from "zod";
import { lengthOf } from "../batchRampup.ts";
import { count, factor, real } from "./numbers.ts";
import { completeOptimizer, Optimizer, OptimizerText } from "./optimizer.ts";

const BatchRampup = z.strictObject({
  start: count.describe("sequences of the first step"),
  increment: count.describe("sequences that each increase adds to the batch"),
  samples: count.describe("sequences over which the batch grows to global_batch, by increases at equal distances"),
});

const DynamicLossScale = z.strictObject({
  initial: real.default(2 ** 32).describe("the first scale"),
  growth: real.default(2).describe("factor of an increase"),
  growth_interval: count.default(1000).describe("consecutive steps without overflow before an increase"),
  backoff: real.default(0.5).describe("factor of a decrease"),
  hysteresis: count.default(2).describe("overflows before the first decrease; until the next increase, each further overflow decreases it"),
  min: real.default(1).describe("the smallest scale"),
});

const Module = z.enum(["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "moe_permute", "shared_experts"]);

const Recompute = z.strictObject({
  mode: z
    .enum(["none", "selective", "full"])
    .default("none")
    .describe(
      "activations that backward recomputes instead of keeping them. selective: those of named modules; full: those of whole layers",
    ),
  modules: z
    .array(Module)
    .min(1)
    .max(Module.options.length)
    .default(["core_attn"])
    .describe(
      "mode selective: the modules, by their names in Megatron Core; moe_permute, which it does not have: the copies of tokens that experts read",
    ),
  method: z
    .enum(["uniform", "block"])
    .default("uniform")
    .describe(
      "mode full. uniform: all layers, in groups of `layers`, whose inputs are kept; block: the first `layers` of each stage or chunk",
    ),
  layers: count.default(1).describe("mode full: layers of a group (uniform), or of a stage or chunk (block)"),
});

const Evaluation = z.strictObject({
  every: count.nullable().default(1000).describe("steps between two evaluations on the validation data; null = none during training"),
  steps: z
    .union([count, z.literal("all")])
    .default(100)
    .describe("batches of global_batch sequences of one evaluation, the same ones each time; all: the whole data once"),
  at_end: z.boolean().default(true).describe("evaluates on the validation and the test data after the last step"),
});

const Metrics = z.strictObject({
  parameter_norm: z
    .boolean()
    .default(false)
    .describe(
      "the L2 norm of the f32 weights after each step that is logged, as log-params-norm of Megatron-LM: each rank then reads the 4 bytes of each weight that it updates once more",
    ),
  router_entropy: z
    .boolean()
    .default(false)
    .describe(
      "mean over tokens and layers of the entropy of the scores of experts in nats, from 0 to ln experts; in each layer a read of the scores, 4 bytes for each token and expert",
    ),
});

/** train as written. */
const InitText = z.strictObject({
  std: factor.optional().describe("standard deviation; default 0.02"),
  output_scaling: z
    .enum(["none", "depth"])
    .default("none")
    .describe(
      "depth: the standard deviation is divided by sqrt(2 x model.layers) for the matrices whose products are added to the residual stream (after attention, and after the activation, of experts too), as Megatron does",
    ),
});

/** Section `train` as it is written: optional keys may be absent. */
export const TrainText = z.strictObject({
  micro_batch: count.default(1).describe("sequences in one forward and backward of one data rank"),
  global_batch: count.optional().describe("sequences in one optimizer step over all data ranks; default: micro_batch x data"),
  steps: count.describe("optimizer steps"),
  batch_rampup: BatchRampup.nullable()
    .default(null)
    .describe("growth of the batch from a smaller one to global_batch; null = global_batch from the first step"),
  loss_weighting: z
    .enum(["microbatch", "token"])
    .default("microbatch")
    .describe(
      "with data.labels that ignore some tokens, the loss of a step is a mean. microbatch: of the means of its microbatches, with equal weights; token: of all its labels, with equal weights. With token, balancing and z losses are multiplied by tokens / labels of the step, as in Megatron Core: if 10 % of the tokens have labels, the weight of these losses is 10 times as large. A step without labels has weight 0",
    ),
  precision: z
    .enum(["fp32", "bf16", "fp16"])
    .default("bf16")
    .describe("bf16, fp16: parameters and activations in 16 bits; sums, main weights and, by default, main gradients and moments in fp32"),
  matmul: z
    .enum(["f32", "tf32"])
    .optional()
    .describe(
      "with precision fp32: the type to which operands of matrix products are rounded, sums are f32. tf32: 10 bits of mantissa instead of 23, on tensor cores; default: f32",
    ),
  gradients: z
    .enum(["f32", "bf16"])
    .default("f32")
    .describe(
      "with precision bf16: the type in which gradients of weight matrices are summed over microbatches and ranks; bf16 halves their memory and traffic, and rounds each sum. Gradients of gains, biases and the embedding table stay in f32",
    ),
  gradient_reduction: z
    .enum(["f32", "bf16"])
    .default("f32")
    .describe(
      "the type in which gradients that a rank sums in f32 over microbatches are sent and summed over ranks. bf16: each is rounded once after the last microbatch, half as many bytes are sent, and sums over ranks are rounded",
    ),
  loss_scale: z
    .union([real, DynamicLossScale])
    .nullable()
    .default(null)
    .describe(
      "fp16: factor on the loss before backward, so that small gradients do not become 0. A step that overflows is skipped; after 4 in a row at a scale that cannot decrease, the run ends. A number is a constant scale, a section a dynamic one; default with fp16: a section of defaults",
    ),
  on_nonfinite: z
    .enum(["stop", "skip"])
    .default("stop")
    .describe(
      "a step whose loss or gradient norm is not finite changes no weights. stop: the run ends with an error, and writes no checkpoint of the step; skip: the run continues, and counts such steps. In fp16, a step that overflows because of the loss scale is skipped with both",
    ),
  evaluation: Evaluation.nullable()
    .default(null)
    .describe(
      "loss and perplexity on validation and test data (data.split, or data.validation and data.test): a forward pass without dropout, jitter and balancing. It changes no number of the training; null = none",
    ),
  metrics: Metrics.optional().describe(
    "numbers that the device computes for the log, beside those that a step needs anyway; absent = none of them",
  ),
  recompute: Recompute.prefault({}).describe("what backward recomputes to save memory"),
  seed: z.int().min(0).default(1234).describe("seed of initial weights, shuffling, dropout and jitter"),
  init: InitText.prefault({}).describe("the normal distribution of the initial weights"),
  init_std: factor.nullable().default(null).describe("the older name of init.std"),
  optimizer: OptimizerText.describe("optimizer and learning-rate schedule"),
});

/** train with every default filled in. */
export const Train = TrainText.required({ global_batch: true }).extend({ init: InitText.required({ std: true }), optimizer: Optimizer });

/** Fills in defaults that depend on other keys. `data`: the number of data replicas. */
export function completeTrain(text: z.output<typeof TrainText>, data: number): z.output<typeof Train> {
  const init = { ...text.init, std: text.init.std ?? text.init_std ?? 0.02 };
  const train = { ...text, init, global_batch: text.global_batch ?? text.micro_batch * data };
  return {
    ...train,
    loss_scale: train.precision === "fp16" ? (train.loss_scale ?? DynamicLossScale.parse({})) : train.loss_scale,
    optimizer: completeOptimizer(train.optimizer, lengthOf(train)),
  };
}
