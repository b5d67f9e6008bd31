/** Layouts of gradients (invariant 5 of shard.ts), and the reductions that wait for the last microbatch. */
import { invariant, type Value } from "../../ops/op.ts";
import { type Graph, idOf } from "../backward.ts";
import { type Layout, layoutKey, PARTIAL_MAX, PARTIAL_SUM, pairs, REPLICATED, type ShardedValue, shardingOf } from "../layout.ts";
import { subAxesOf } from "../mesh.ts";
import type { NodeSharder } from "./nodeSharder.ts";
import { type Placements, replicated } from "./placements.ts";
import { resultReason } from "./reasons.ts";
import type { Resharder } from "./resharder.ts";
import type { ShardStep } from "./steps.ts";

/** Moves a complete gradient to the layout of its value, and emits the accumulation of a parameter's gradient. */
export class GradientSharder {
  /** Per parameter, the accumulated gradient before its reduction. */
  readonly accumulated = new Map<Value, ShardedValue>();
  readonly #graph: Pick<Graph, "grad" | "gradOf">;
  readonly #placements: Placements;
  readonly #nodes: NodeSharder;

  constructor(graph: Pick<Graph, "grad" | "gradOf">, placements: Placements, nodes: NodeSharder) {
    this.#graph = graph;
    this.#placements = placements;
    this.#nodes = nodes;
  }

  /** Processes a result of a node. Does nothing if it is no gradient, or an addend of an activation's gradient. */
  settle(v: Value, stage: number, backward: boolean, into: ShardStep[]): void {
    const of = this.#graph.gradOf.get(v);
    if (!of) return;
    const isParameter = of.leaf?.kind === "parameter";
    if (!isParameter && this.#graph.grad.get(of) !== v) return;
    const { layout } = this.#placements.of(of);
    const now = this.#placements.of(v).layout;
    const partialSum = now.partialSum.filter((f) => {
      const kind = shardingOf(layout, f);
      return isParameter || this.#nodes.copySumsOf(v).includes(f) ? kind === REPLICATED : kind === PARTIAL_SUM || kind === PARTIAL_MAX;
    });
    this.#nodes.moveTo(v, { ...layout, partialSum, partialMax: [] }, `the gradient of ${idOf(of)} takes its layout`, backward, into);
    if (!isParameter) return;
    const shardedValue: ShardedValue = { value: v, layout: this.#placements.of(v).layout };
    into.push({ kind: "accumulate", stage, parameter: of, shardedValue });
    const first = this.accumulated.get(of);
    invariant(!first || layoutKey(first) === layoutKey(shardedValue), `${idOf(of)}: its uses have different partial sums`);
    if (!first) this.accumulated.set(of, shardedValue);
  }
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
function stateLayout(p: Value, partial: readonly number[], placements: Placements, { distributedOptimizer, shares }: StateOptions): Layout {
  const { layout } = placements.of(p);
  const shared = partial.toReversed().filter(shares);
  // parameters with a custom update rule (expert bias) need the full count, so they are not sharded
  if (!distributedOptimizer || p.leaf?.rule) return layout;
  const first = pairs(p.sizes, layout.shardedBy).findIndex(([n, fs]) => n % placements.count([...fs, ...shared]) === 0);
  return { ...layout, shardedBy: layout.shardedBy.map((fs, dim) => (dim === first ? [...fs, ...shared] : fs)) };
}

/** Emits the reductions of gradients after the last microbatch. Returns the reduced gradient of each parameter. */
export function reduceGradients(
  parameters: readonly Value[],
  accumulated: ReadonlyMap<Value, ShardedValue>,
  { placements, resharder }: { readonly placements: Placements; readonly resharder: Resharder },
  options: StateOptions,
  into: ShardStep[],
): Map<Value, ShardedValue> {
  const { mesh } = placements;
  const reduced = new Map<Value, ShardedValue>();
  for (const p of parameters) {
    const gradient = accumulated.get(p);
    invariant(gradient !== undefined, `${idOf(p)} has no accumulated gradient`);
    const { partialSum } = gradient.layout;
    const target = stateLayout(p, partialSum, placements, options);
    const sharding = placements.of(p).layout.shardedBy.flat();
    const isExpert =
      partialSum.length > 0 &&
      subAxesOf(mesh, "edp").join() === partialSum.join() &&
      sharding.some((f) => subAxesOf(mesh, "ep").includes(f) || subAxesOf(mesh, "etp").includes(f));
    // the gradient of a parameter that several chunks use is on the stage of the last one
    const { stage } = placements.of(gradient.value);
    const why = resultReason(mesh, `gradient of ${idOf(p)}`, "each rank saw other tokens", { ragged: Number(isExpert) });
    reduced.set(p, resharder.reshard(gradient.value, target, { stage, backward: true, why, into }));
  }
  return reduced;
}

/** Emits the reductions of losses after the last microbatch. Losses with equal names and layouts share an accumulator. */
export function reduceLosses(
  losses: Graph["losses"],
  roleOf: (stage: number) => number,
  { placements, resharder }: { readonly placements: Placements; readonly resharder: Resharder },
  into: ShardStep[],
): void {
  const reduced = new Set<string>();
  for (const { name, value } of losses) {
    const { layout, stage } = placements.of(value);
    const key = `${name}|${roleOf(stage)}|${layoutKey({ value, layout })}`;
    if (reduced.has(key)) continue;
    reduced.add(key);
    const why = resultReason(placements.mesh, name, "each rank saw other tokens", value);
    resharder.reshard(value, replicated(value), { stage, backward: true, why, into });
  }
}
