/** Sharding of the optimizer step: layouts of gradients and state, the reductions of gradients, and the nodes of the updates. */
import { invariant } from "../../ops/op.ts";
import { idOf } from "../backward.ts";
import { type Layout, layoutKey, pairs, type ShardedValue } from "../layout.ts";
import { subAxesOf } from "../mesh.ts";
import type { ParameterUpdate } from "../updateGraph.ts";
import { usesOf } from "./dimChoice.ts";
import type { NodeSharder } from "./nodeSharder.ts";
import type { Placements } from "./placements.ts";
import { resultReason } from "./reasons.ts";
import type { Resharder } from "./resharder.ts";
import type { ShardStep } from "./steps.ts";

/** What the functions below work with. */
export interface UpdateSharder {
  readonly placements: Placements;
  readonly resharder: Resharder;
  readonly nodes: NodeSharder;
}
/** How the optimizer state is sharded. */
export interface StateOptions {
  /** Whether optimizer state is sharded over the sub-axes that gradients are summed over. */
  readonly distributedOptimizer: boolean;
  /** Returns whether optimizer state is sharded over a sub-axis; over the other sub-axes it is replicated. */
  readonly shares: (factor: number) => boolean;
}

/**
 * Returns the layout of the optimizer state of a parameter. With the distributed optimizer, the sub-axes over which its gradient is
 * partial shard the first dim that they divide; if they divide none, the layout is that of the parameter.
 */
function stateLayout(
  { parameter: p, weights }: ParameterUpdate,
  partial: readonly number[],
  placements: Placements,
  { distributedOptimizer, shares }: StateOptions,
): Layout {
  const { layout } = placements.of(p);
  const shared = partial.toReversed().filter(shares);
  // a rule that updates the parameter itself (expert bias) needs the full count, so its state is not sharded
  if (!distributedOptimizer || weights === p) return layout;
  const first = pairs(p.sizes, layout.shardedBy).findIndex(([n, fs]) => n % placements.count([...fs, ...shared]) === 0);
  return { ...layout, shardedBy: layout.shardedBy.map((fs, dim) => (dim === first ? [...fs, ...shared] : fs)) };
}

/**
 * Places the accumulated gradient of a parameter, and emits its reduction to the layout of the optimizer state, in which it places the
 * weights and the state.
 */
export function reduceGradient(
  update: ParameterUpdate,
  accumulated: ShardedValue,
  { placements, resharder }: UpdateSharder,
  options: StateOptions,
  into: ShardStep[],
): void {
  const { parameter: p, gradient, weights, state } = update;
  const { mesh } = placements;
  const { partialSum } = accumulated.layout;
  // the gradient of a parameter that several chunks use is on the stage of the last one
  const { stage } = placements.of(accumulated.value);
  placements.place(gradient, accumulated.layout, stage);
  const sharding = placements.of(p).layout.shardedBy.flat();
  const isExpert =
    partialSum.length > 0 &&
    subAxesOf(mesh, "edp").join() === partialSum.join() &&
    sharding.some((f) => subAxesOf(mesh, "ep").includes(f) || subAxesOf(mesh, "etp").includes(f));
  const target = stateLayout(update, partialSum, placements, options);
  const why = resultReason(mesh, `gradient of ${idOf(p)}`, "each rank saw other tokens", { ragged: Number(isExpert) }, p);
  const { layout } = resharder.reshard(gradient, target, { stage, backward: true, why, into });
  for (const leaf of [gradient, ...state, ...(weights === p ? [] : [weights])]) placements.place(leaf, layout, placements.of(p).stage);
}

/** Emits the nodes of an update, and the reshard of the result to the layout of the parameter. */
export function shardUpdate({ parameter, nodes, result, weights }: ParameterUpdate, sharder: UpdateSharder, into: ShardStep[]): void {
  const { placements, resharder } = sharder;
  const { layout, stage } = placements.of(parameter);
  let changes = idOf(parameter);
  for (const node of nodes) {
    sharder.nodes.shard(usesOf(node), stage, into);
    for (const value of node.outs) {
      const { updates } = value;
      if (!updates) continue;
      if (updates === weights) changes = node.id;
      const [made, kept] = [value, updates].map((v) => layoutKey({ value: v, layout: placements.of(v).layout }));
      invariant(made === kept, `${node.id} would move ${idOf(updates)}`);
    }
  }
  const { position } = parameter.leaf ?? {};
  const why = () => ({ op: changes, because: "each rank updated its shard", path: "parallel.distributed_optimizer", position });
  resharder.reshard(result, layout, { stage, backward: true, why, into });
}
