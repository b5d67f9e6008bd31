/**
 * Parameter groups: which parameters use which update rule. A rule adds the ops of one parameter's update to the graph of the optimizer
 * step; `shard` shards them like any other op. docs/adding-an-optimizer.md adds a rule.
 */
import type { Job } from "../../schemas/job.ts";
import type { Parameter } from "../../schemas/plan.ts";
import { coefficientTypes } from "../ops/newtonSchulz.ts";
import { type AnyOp, type Attrs, invariant, type Value } from "../ops/op.ts";
import * as optimizer from "../ops/optimizer.ts";

type OptimizerOptions = Job["train"]["optimizer"];
type MuonOptions = NonNullable<OptimizerOptions["muon"]>;
/** Scalars of a step that update ops may read. `clip.scale` multiplies gradients; it is 0 if the step is skipped. The host writes the others. */
export type StepScalar = "lr" | "step" | "weight_decay" | "clip.scale";

/** The update of one parameter under construction. */
export interface UpdateBuilder {
  readonly parameter: Value;
  readonly options: OptimizerOptions;
  /** The gradient, summed over all ranks and microbatches, or what an update rule without a gradient reads in its place. */
  readonly gradient: Value;
  /** The f32 weights that the update changes in place. */
  readonly weights: Value;
  /** Whether the update may also store the weights in the type of the parameter; otherwise an op of its own casts them. */
  readonly stores: boolean;
  /** Returns f32 optimizer state of the shape of the parameter. It starts as zeros and is part of a checkpoint. */
  state(name: string): Value;
  scalar(name: StepScalar): Value;
  /** Adds an op. `state`: per output that the op updates in place, the weights or the state. Returns the outputs by name. */
  apply(
    op: AnyOp,
    id: string,
    operands: Readonly<Record<string, Value>>,
    state: Readonly<Record<string, Value>>,
    attrs: Attrs,
  ): Readonly<Record<string, Value>>;
}

/** Parameters with one update rule. */
export interface ParameterGroup {
  readonly rule: Parameter["rule"];
  /** Returns whether a parameter uses the rule. The first group that contains a parameter decides. */
  contains(parameter: Value, options: OptimizerOptions): boolean;
  update(builder: UpdateBuilder): void;
}

/** Returns whether weight decay changes over the run, so that the ops read it as a scalar of the step. */
const isDecayScheduled = ({ weight_decay_schedule }: OptimizerOptions): boolean => weight_decay_schedule !== "constant";

/**
 * An update op in its forms: with a constant weight decay (attribute) or one that is scheduled (operand), and whether it also stores the
 * new weights in a 16-bit type (output `y`). Where such a form is missing, an op of its own casts the weights.
 */
interface UpdateOps {
  readonly constant: AnyOp;
  readonly scheduled: AnyOp;
  readonly constantCast?: AnyOp;
  readonly scheduledCast?: AnyOp;
}
/** Applies an update op to gradient and weights. Weight decay applies to parameters with two or more dims. */
function applyUpdate(
  b: UpdateBuilder,
  id: string,
  ops: UpdateOps,
  operands: Readonly<Record<string, Value>>,
  moments: readonly string[],
  attrs: Attrs,
) {
  const decays = b.parameter.sizes.length > 1;
  const isScheduled = decays && isDecayScheduled(b.options);
  const cast = b.parameter.dtype === "f32" || !b.stores ? {} : { constant: ops.constantCast, scheduled: ops.scheduledCast };
  b.apply(
    isScheduled ? (cast.scheduled ?? ops.scheduled) : (cast.constant ?? ops.constant),
    id,
    {
      scale: b.scalar("clip.scale"),
      lr: b.scalar("lr"),
      ...operands,
      ...(isScheduled && { decay: b.scalar("weight_decay") }),
    },
    { w: b.weights, ...Object.fromEntries(moments.map((m) => [m, b.state(m)])) },
    { ...attrs, ...(!isScheduled && { decay: decays ? b.options.weight_decay : 0 }) },
  );
}
const adaptive = (b: UpdateBuilder, id: string, ops: UpdateOps): void => {
  const { betas, eps } = b.options;
  applyUpdate(b, id, ops, { g: b.gradient, step: b.scalar("step") }, ["m", "v"], { beta1: betas[0], beta2: betas[1], eps });
};
/** A rule that the parameter itself declares: an op on a statistic of the step. */
const declared = (rule: "expert_bias" | "quantile"): ParameterGroup => ({
  rule,
  contains: ({ leaf }) => leaf?.rule?.name === rule,
  update(b) {
    const own = b.parameter.leaf?.rule;
    const [statistic, changed] = [own?.op.inputs[0], own?.op.outputs[0]];
    invariant(own !== undefined && statistic !== undefined && changed !== undefined, `${rule}: the op has no input or no output`);
    b.apply(own.op, "update", { [statistic.name]: b.gradient, scale: b.scalar("clip.scale") }, { [changed.name]: b.weights }, own.attrs);
  },
});
const isOptimizer =
  (type: OptimizerOptions["type"]): ParameterGroup["contains"] =>
  (_, options) =>
    options.type === type;

/**
 * Returns the factor on an orthogonal update of a matrix [in, out]. The modes are those of Megatron Core's `muon_scale_mode`. With
 * `spectral` and an extra factor of 0.2 updates are as large as those of AdamW (Liu et al. 2025, arXiv 2502.16982).
 */
function muonFactor({ sizes }: Value, { scale_mode, extra_scale_factor }: MuonOptions): number {
  const [inputs = 1, outputs = 1] = sizes.slice(-2);
  const scales = {
    spectral: Math.max(inputs, outputs),
    unit_rms_norm: outputs / inputs,
    shape_scaling: Math.max(1, outputs / inputs),
  };
  return extra_scale_factor * Math.sqrt(scales[scale_mode]);
}

const plainSgd: UpdateOps = {
  ...{ constant: optimizer.sgd, scheduled: optimizer.sgdScheduled },
  ...{ constantCast: optimizer.sgdCast, scheduledCast: optimizer.sgdScheduledCast },
};
const momentumSgd: UpdateOps = {
  ...{ constant: optimizer.sgdMomentum, scheduled: optimizer.sgdMomentumScheduled },
  ...{ constantCast: optimizer.sgdMomentumCast, scheduledCast: optimizer.sgdMomentumScheduledCast },
};

/** All groups, in the order in which they are asked. */
export const parameterGroups: readonly ParameterGroup[] = [
  declared("expert_bias"),
  declared("quantile"),
  {
    // as in Megatron Core and Moonlight: all hidden matrices, the router's among them, and the matrix of each expert
    rule: "muon",
    contains: ({ leaf }, { type }) => type === "muon" && leaf?.role === "matrix",
    update(b) {
      const options = b.options.muon;
      invariant(options !== undefined, "a job with muon has its options");
      const { momentum, nesterov, coefficients } = options;
      const scale = b.scalar("clip.scale");
      const attrs = { momentum, nesterov: Number(nesterov) };
      const { u } = b.apply(optimizer.muonMomentum, "momentum", { g: b.gradient, scale }, { m: b.state("m") }, attrs);
      invariant(u !== undefined, "muon_momentum has an output u");
      const op = b.parameter.sizes.length > 2 ? optimizer.orthogonalizeExperts : optimizer.orthogonalize;
      const { y } = b.apply(op, "orthogonal", { x: u }, {}, { coefficients: coefficientTypes.indexOf(coefficients) });
      invariant(y !== undefined, `${op.name} has an output y`);
      const ops = { constant: optimizer.muon, scheduled: optimizer.muonScheduled };
      applyUpdate(b, "muon", ops, { u: y }, [], { factor: muonFactor(b.parameter, options) });
    },
  },
  {
    rule: "adamw",
    contains: (_, { type }) => type === "adamw" || type === "muon",
    update: (b) =>
      adaptive(b, "adamw", { constant: optimizer.adamw, scheduled: optimizer.adamwScheduled, constantCast: optimizer.adamwCast }),
  },
  {
    rule: "adam",
    contains: isOptimizer("adam"),
    update: (b) => adaptive(b, "adam", { constant: optimizer.adam, scheduled: optimizer.adamScheduled, constantCast: optimizer.adamCast }),
  },
  {
    rule: "sgd",
    contains: isOptimizer("sgd"),
    update(b) {
      const { momentum } = b.options;
      if (momentum === 0) applyUpdate(b, "sgd", plainSgd, { g: b.gradient }, [], {});
      else applyUpdate(b, "sgd", momentumSgd, { g: b.gradient }, ["m"], { momentum });
    },
  },
];

/** Returns the scalars that the host writes for each step of a job. */
export const hostScalars = ({ optimizer }: Job["train"]): Exclude<StepScalar, "clip.scale">[] => [
  "lr",
  ...(optimizer.type === "sgd" ? [] : (["step"] as const)),
  ...(isDecayScheduled(optimizer) ? (["weight_decay"] as const) : []),
];
