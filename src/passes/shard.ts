/**
 * The sharding pass: graph and mesh → instructions on sharded values, and the reshard steps between them. The pass names no op, no
 * parameter and no axis.
 *
 * A layout gives per dim of a tensor the sub-axes that shard it, outermost first, and the sub-axes over which a sum or a maximum is
 * pending. Each op assigns to each sub-axis one of its dims. The first rule that applies decides:
 *   1  the sharding of state that the op updates in place
 *   2  the model pins the sub-axis
 *   3  all inputs are partial sums and the op is linear: the output is partial
 *   4  the sharding of a parameter, since parameters are never resharded
 *   5  the dim by which all sharded inputs agree
 *   6  a dim of the output (a dim of inputs only would make it partial), then the dim of the first operand
 * One invariant (7) holds: a complete gradient has the layout of its value. Two gradients may be partial: that of a parameter until
 * the end of the step, and that of a value with copies on several ranks, or that several ranks compute as the model pins no dim, over those
 * ranks, until it reaches a parameter or an op that is not linear.
 * Every choice gives the same numbers (a law that tests check); the rules decide only the cost.
 *
 * The parts: sharding/dimChoice.ts applies the rules, resharder.ts inserts reshard steps and transfers, nodeSharder.ts uses both for one
 * node, gradients.ts holds the invariant, updates.ts shards the optimizer step.
 */
import type { Mesh } from "./mesh.ts";
import { type Pick, usesOf } from "./sharding/dimChoice.ts";
import { GradientSharder, reduceLosses } from "./sharding/gradients.ts";
import { NodeSharder } from "./sharding/nodeSharder.ts";
import { Placements, replicated } from "./sharding/placements.ts";
import { Resharder } from "./sharding/resharder.ts";
import type { ShardedGraph, ShardStep } from "./sharding/steps.ts";
import { reduceGradient, type StateOptions, shardUpdate } from "./sharding/updates.ts";
import type { TrainingGraph } from "./updateGraph.ts";

/** Decisions of the job that the pass needs. */
export interface ShardOptions extends StateOptions {
  /** Returns the virtual stage of a position of the model. In this pass a stage is always a virtual stage. */
  readonly stageOf: (position: number) => number;
  /** Returns the physical stage whose ranks run a virtual stage. */
  readonly roleOf: (stage: number) => number;
  /** Replaces rules 4 to 6; tests use it to try random choices. */
  readonly pick?: Pick;
}

/** Shards a graph. Throws an invariant if a dim does not divide by its sub-axes, or if uses of a parameter have different partial sums. */
export function shard(graph: TrainingGraph, mesh: Mesh, { stageOf, roleOf, pick, ...state }: ShardOptions): ShardedGraph {
  const placements = new Placements(mesh);
  const resharder = new Resharder(placements, roleOf);
  const nodes = new NodeSharder(placements, resharder, pick);
  const gradients = new GradientSharder(graph, placements, nodes);
  for (const v of graph.order.flatMap((n) => n.args))
    if (v.leaf && !placements.has(v)) placements.place(v, placements.declared(v), stageOf(v.leaf.position));

  const steps: ShardStep[] = [];
  for (const node of graph.order) {
    const stage = stageOf(node.position);
    nodes.shard(usesOf(node), stage, steps);
    for (const v of node.outs) {
      if (v.shardAxes) nodes.moveTo(v, placements.declared(v), "the model declares this layout", { backward: node.backward, into: steps });
      gradients.settle(v, stage, node.backward, steps);
    }
  }
  const deferred: ShardStep[] = [];
  const updates: ShardStep[] = [];
  const sharder = { placements, resharder, nodes };
  for (const scalar of graph.scalars.values()) placements.place(scalar, replicated(scalar), 0);
  for (const update of graph.updates) reduceGradient(update, gradients.of(update.parameter), sharder, state, deferred);
  reduceLosses(graph.losses, roleOf, sharder, deferred);
  for (const update of graph.updates) if (update.nodes.length > 0) shardUpdate(update, sharder, updates);
  return { steps, deferred, updates, placement: placements.all, forms: nodes.forms };
}
