/**
 * The optimizer step as a graph: per parameter, the leaves that its update reads (gradient, f32 weights, state, scalars of the step) and
 * the nodes of its update rule. `shard` places gradients as partial sums and state in the layout of the update, and inserts the
 * reduce-scatters, all-reduces and all-gathers.
 */
import type { Dtype } from "../../schemas/dtypes.ts";
import type { Job } from "../../schemas/job.ts";
import type { Parameter } from "../../schemas/plan.ts";
import { cast } from "../ops/gemm.ts";
import { type AnyOp, type Attrs, changed, invariant, type Leaf, type Node, type Value } from "../ops/op.ts";
import { type Graph, idOf } from "./backward.ts";
import { pairs } from "./layout.ts";
import { parameterGroups, type StepScalar, type UpdateBuilder } from "./parameterGroups.ts";

/** The update of one parameter. */
export interface ParameterUpdate {
  readonly parameter: Value;
  readonly rule: Parameter["rule"];
  /** The leaf of the gradient that accumulated over the microbatches. */
  readonly gradient: Value;
  /** The f32 weights: the parameter itself, or a leaf of their own if its type is narrower or its optimizer state is sharded further. */
  readonly weights: Value;
  /** Leaves of the optimizer state. */
  readonly state: readonly Value[];
  /** Nodes in an order in which they can run. Tied copies have none: their owner's stage sends them the result. */
  readonly nodes: readonly Node[];
  /** The updated parameter, in its type. */
  readonly result: Value;
}
/** A graph with the updates of its parameters, in their order, and the scalars that updates read. */
export interface TrainingGraph extends Graph {
  readonly updates: readonly ParameterUpdate[];
  readonly scalars: ReadonlyMap<StepScalar, Value>;
}

/** Adds the optimizer step to a graph with gradients. Throws an invariant if a parameter belongs to no group. */
export function addUpdates(graph: Graph, job: Pick<Job, "train" | "parallel">): TrainingGraph {
  const scalars = new Map<StepScalar, Value>();
  const scalar = (name: StepScalar): Value => {
    const known = scalars.get(name) ?? leafOf(name, [], { kind: "input", position: 0 });
    scalars.set(name, known);
    return known;
  };
  return { ...graph, scalars, updates: graph.parameters.map((p) => updateOf(p, job, scalar)) };
}

const leafOf = (name: string, sizes: readonly number[], leaf: Omit<Leaf, "name">): Value => ({
  ...{ out: 0, ragged: 0, fanout: 0, dtype: "f32", sizes },
  leaf: { ...leaf, name },
});

type Operands = Readonly<Record<string, Value>>;

/**
 * Returns the type in which the gradient of a parameter is summed over microbatches and ranks. The embedding table is not the result of a
 * product: its gradient is added to row by row, and each addition would round. A vocabulary matrix [width, vocabulary] is an output head.
 */
export const gradientTypeOf = ({ leaf, dtype, sizes }: Value, { gradients }: Pick<Job["train"], "gradients">): Dtype =>
  gradients === "bf16" && dtype === "bf16" && sizes.length > 1 && (leaf?.role === "matrix" || leaf?.name === "head") && !leaf.rule
    ? "bf16"
    : "f32";

/**
 * Returns whether the gradient of a parameter, summed in f32 over microbatches, is sent in bf16. Counts of tokens, which take the place of a
 * gradient, are sent exactly.
 */
export const isReducedInBf16 = ({ parameter, gradient }: Pick<ParameterUpdate, "parameter" | "gradient">, train: Job["train"]): boolean =>
  train.gradient_reduction === "bf16" && gradient.dtype === "f32" && !parameter.leaf?.rule;

function updateOf(
  parameter: Value,
  { train, parallel }: Pick<Job, "train" | "parallel">,
  scalar: UpdateBuilder["scalar"],
): ParameterUpdate {
  const options = train.optimizer;
  const name = idOf(parameter);
  const group = parameterGroups.find((g) => g.contains(parameter, options));
  invariant(group !== undefined && parameter.leaf !== undefined, `${name} belongs to no parameter group`);
  const { position, rule, tiedTo } = parameter.leaf;
  const own = (kind: Leaf["kind"], suffix: string): Value => leafOf(`${name}.${suffix}`, parameter.sizes, { kind, position });
  const gradient = { ...own("gradient", "grad"), dtype: gradientTypeOf(parameter, train) };
  // an update rule that the parameter declares changes the parameter itself
  const weights = rule ? parameter : own("state", "master");
  const common = { parameter, rule: group.rule, gradient, weights };
  if (tiedTo) return { ...common, state: [], nodes: [], result: parameter };
  const state: Value[] = [];
  const nodes: Node[] = [];
  let result = weights;
  let stored: Value | undefined;
  const addNode = (op: AnyOp, id: string, operands: Operands, updated: Operands, attrs: Attrs, type?: Value["dtype"]): Operands => {
    for (const output of Object.keys(updated))
      invariant(op.inPlace?.includes(output) === true, `${op.name} does not update ${output} in place`);
    const [{ node: made } = {}] = Object.values(op.all(operands, attrs, `${name}.${id}`));
    invariant(made !== undefined, `${op.name} has no outputs`);
    // an op that updates the weights may also store them in the type of the parameter
    const storedType = Object.values(updated).includes(weights) ? parameter.dtype : type;
    const outs = pairs(op.outputs, made.outs).map(([output, out]) => {
      const updates = updated[output.name];
      return { ...out, ...(updates && { updates, dtype: updates.dtype }), ...(output.name === "y" && storedType && { dtype: storedType }) };
    });
    const node = changed(made, { position, backward: true, outs });
    nodes.push(node);
    const byName = Object.fromEntries(pairs(op.outputs, node.outs).map(([output, out]) => [output.name, out]));
    const after = node.outs.find(({ updates }) => updates === weights);
    if (after) [result, stored] = [after, byName.y];
    return byName;
  };
  group.update({
    ...{ parameter, options, gradient, weights, scalar, apply: addNode },
    // the next forward casts the weights where it gathers them
    stores: parallel.parameter_gather === "step",
    state(suffix) {
      const leaf = { ...own("state", suffix), dtype: options.moments };
      state.push(leaf);
      return leaf;
    },
  });
  invariant(result !== weights, `${group.rule} does not update ${name}`);
  if (stored) result = stored;
  else if (parameter.dtype !== "f32") {
    const { y } = addNode(cast, "cast", { x: result }, {}, {}, parameter.dtype);
    invariant(y !== undefined, "cast has an output y");
    result = y;
  }
  return { ...common, state, nodes, result };
}
