/** The section train.optimizer: the update rule, and the schedules of learning rate and weight decay. */
import { z } from "zod";
import { real } from "./numbers.ts";

const Muon = z.strictObject({
  momentum: real.default(0.95).describe("decay rate of the running mean of gradients"),
  nesterov: z
    .boolean()
    .default(true)
    .describe("Nesterov momentum: the update is the running mean, moved once more towards the gradient; false: the running mean itself"),
  coefficients: z
    .enum(["simple", "quintic"])
    .default("simple")
    .describe(
      "coefficients of the iterations that make an update orthogonal. simple: the same ones each time; quintic: others in each iteration, Megatron Core's default",
    ),
  scale_mode: z
    .enum(["spectral", "unit_rms_norm", "shape_scaling"])
    .default("spectral")
    .describe(
      "factor on the update of a matrix [in, out], as in Megatron Core. spectral: the root of max(in, out); unit_rms_norm: the root of out / in; shape_scaling: the root of max(1, out / in)",
    ),
  extra_scale_factor: real
    .default(0.2)
    .describe(
      "further factor on the update; 0.2 with spectral gives updates as large as those of adamw (Moonlight), so that lr and weight_decay carry over",
    ),
});

/** train.optimizer as written. */
export const OptimizerText = z.strictObject({
  type: z
    .enum(["adamw", "adam", "sgd", "muon"])
    .default("adamw")
    .describe(
      "adamw: weight decay is subtracted from the weights; adam, sgd: it is added to the gradients (L2 regularisation); muon: orthogonal updates of hidden matrices (each expert and routers included), adamw for embeddings, output head, gains and biases",
    ),
  muon: Muon.optional().describe("muon: its options; betas and eps are those of adamw for the other parameters"),
  lr: real.describe("the largest learning rate, reached after warm-up"),
  min_lr: real.default(0).describe("the learning rate at the end of the decay and after it"),
  warmup_steps: real
    .min(0)
    .default(0)
    .describe(
      "steps in which the learning rate rises linearly from warmup_init; with train.batch_rampup, in units of global_batch sequences",
    ),
  warmup_init: real.default(0).describe("the learning rate at the beginning of the warm-up"),
  decay_steps: real
    .min(0)
    .optional()
    .describe("the step after which the learning rate is min_lr, warm-up included, in units of warmup_steps; default: the whole run"),
  schedule: z
    .enum(["constant", "linear", "cosine", "inverse_square_root", "wsd"])
    .default("constant")
    .describe("shape of the decay after warm-up; wsd: constant, then a decay over the last wsd_decay_steps"),
  wsd_decay_steps: real.min(0).nullable().default(null).describe("wsd: length of the decay, which ends at decay_steps"),
  wsd_decay: z.enum(["exponential", "linear", "cosine", "minus_sqrt"]).default("exponential").describe("wsd: shape of the decay"),
  betas: z
    .tuple([real, real])
    .default([0.9, 0.95])
    .describe("adamw, adam, and adamw beside muon: decay rates of the first and of the second moment"),
  eps: real.default(1e-8).describe("adamw, adam: added to the root of the second moment"),
  momentum: real.default(0.9).describe("sgd: factor on the previous update; 0 = no momentum, and no memory for it"),
  moments: z
    .enum(["f32", "bf16"])
    .default("f32")
    .describe(
      "with precision bf16: the type in which the optimizer keeps its moments (momentum of sgd and muon); the update itself is computed in f32, and main weights stay exact",
    ),
  weight_decay: real.default(0.1).describe("weight decay of parameters with two or more dims"),
  weight_decay_schedule: z
    .enum(["constant", "linear", "cosine"])
    .default("constant")
    .describe("schedule of weight decay: constant at weight_decay, or from weight_decay_start to weight_decay_end"),
  weight_decay_start: real.nullable().default(null).describe("weight decay of the first step, with a schedule that is not constant"),
  weight_decay_end: real.nullable().default(null).describe("weight decay at the end of the run, with a schedule that is not constant"),
  clip: real.default(1.0).describe("largest global norm of the gradient; 0 = no clipping"),
});

/** train.optimizer with every default filled in. */
export const Optimizer = OptimizerText.required({ decay_steps: true });

/** Fills in defaults that depend on other keys. `length`: steps of the full batch in the run. */
export function completeOptimizer(optimizer: z.output<typeof OptimizerText>, length: number): z.output<typeof Optimizer> {
  return {
    ...optimizer,
    ...(optimizer.type === "muon" && { muon: optimizer.muon ?? Muon.parse({}) }),
    decay_steps: optimizer.decay_steps ?? length,
  };
}
