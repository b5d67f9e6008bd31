/**
 * The graph of an evaluation: the forward pass without gradients and updates. Its parameters are those of the training graph; all other
 * ids begin with `eval.`, so that both graphs are lowered to one program.
 */
import type { ModelGraph } from "../model/builder.ts";
import { changed, type Value } from "../ops/op.ts";
import { rewriteModel, topological } from "./graphOrder.ts";
import type { TrainingGraph } from "./updateGraph.ts";

const PREFIX = "eval.";

/** Returns the graph of a model that `buildEvaluation` made, after the passes that place its parameters. */
export function evaluationGraph(model: ModelGraph): TrainingGraph {
  const inputs = new Map<Value, Value>();
  const renamed = (v: Value): Value => {
    if (v.leaf?.kind !== "input") return v;
    const own = inputs.get(v) ?? { ...v, leaf: { ...v.leaf, name: PREFIX + v.leaf.name } };
    inputs.set(v, own);
    return own;
  };
  const { losses } = rewriteModel(model, (node, args) => changed(node, { ...kept(node), id: PREFIX + node.id, args: args.map(renamed) }));
  const order = topological(losses.map(({ value }) => value));
  const parameters = [...new Set(order.flatMap(({ args }) => args).filter((v) => v.leaf?.kind === "parameter"))];
  const none = new Map<never, never>();
  return { losses, parameters, order, grad: none, parameterGrads: none, gradOf: none, updates: [], scalars: none };
}

const kept = ({ pins, ring, regrid, sharing }: Parameters<typeof changed>[0]) => ({ pins, ring, regrid, sharing });
