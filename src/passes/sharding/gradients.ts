/** Layouts of gradients (invariant 7 of shard.ts), and the reductions of losses at the end of a step. */
import { invariant, type Value } from "../../ops/op.ts";
import { type Graph, idOf } from "../backward.ts";
import { layoutKey, PARTIAL_MAX, PARTIAL_SUM, REPLICATED, type ShardedValue, shardingOf } from "../layout.ts";
import { subAxesOf } from "../mesh.ts";
import type { NodeSharder } from "./nodeSharder.ts";
import { type Placements, replicated } from "./placements.ts";
import { resultReason } from "./reasons.ts";
import { isByPlace, type Resharder } from "./resharder.ts";
import type { ShardStep } from "./steps.ts";

/** Moves a complete gradient to the layout of its value, and emits the accumulation of a parameter's gradient. */
export class GradientSharder {
  readonly #accumulated = new Map<Value, ShardedValue>();
  readonly #graph: Pick<Graph, "grad" | "gradOf">;
  readonly #placements: Placements;
  readonly #nodes: NodeSharder;

  constructor(graph: Pick<Graph, "grad" | "gradOf">, placements: Placements, nodes: NodeSharder) {
    this.#graph = graph;
    this.#placements = placements;
    this.#nodes = nodes;
  }

  /** Returns the accumulated gradient of a parameter, before its reduction. Throws an invariant if no node made one. */
  of(parameter: Value): ShardedValue {
    const accumulated = this.#accumulated.get(parameter);
    invariant(accumulated !== undefined, `${idOf(parameter)} has no accumulated gradient`);
    return accumulated;
  }

  /** Processes a result of a node. Does nothing if it is no gradient, or an addend of an activation's gradient. */
  settle(v: Value, stage: number, backward: boolean, into: ShardStep[]): void {
    const of = this.#graph.gradOf.get(v);
    if (!of) return;
    const isParameter = of.leaf?.kind === "parameter";
    if (!isParameter && this.#graph.grad.get(of) !== v) return;
    const { layout } = this.#placements.of(of);
    const now = this.#placements.of(v).layout;
    const repeated = of.node?.pins?.flatMap(({ dim, axis }) => (dim === undefined ? subAxesOf(this.#placements.mesh, axis) : [])) ?? [];
    const copySums = [...this.#nodes.copySumsOf(v), ...repeated.filter((f) => now.partialSum.includes(f))];
    this.#nodes.setCopySums(v, copySums);
    const partialSum = now.partialSum.filter((f) => {
      const kind = shardingOf(layout, f);
      return isParameter || copySums.includes(f) ? kind === REPLICATED : kind === PARTIAL_SUM || kind === PARTIAL_MAX;
    });
    const destination = { backward, byPlace: of.node && isByPlace(of.node), into };
    this.#nodes.moveTo(v, { ...layout, partialSum, partialMax: [] }, `the gradient of ${idOf(of)} takes its layout`, destination);
    if (!isParameter) return;
    const shardedValue: ShardedValue = { value: v, layout: this.#placements.of(v).layout };
    into.push({ kind: "accumulate", stage, parameter: of, shardedValue });
    const first = this.#accumulated.get(of);
    invariant(!first || layoutKey(first) === layoutKey(shardedValue), `${idOf(of)}: its uses have different partial sums`);
    if (!first) this.#accumulated.set(of, shardedValue);
  }
}

/** Emits the reductions of losses after the last microbatch. Losses that are equal in name, depth and layout share an accumulator. */
export function reduceLosses(
  losses: Graph["losses"],
  roleOf: (stage: number) => number,
  { placements, resharder }: { readonly placements: Placements; readonly resharder: Resharder },
  into: ShardStep[],
): void {
  const reduced = new Set<string>();
  for (const { name, depth = 1, value } of losses) {
    const { layout, stage } = placements.of(value);
    const key = `${name}|${depth}|${roleOf(stage)}|${layoutKey({ value, layout })}`;
    if (reduced.has(key)) continue;
    reduced.add(key);
    const why = resultReason(placements.mesh, name, "each rank saw other tokens", value);
    resharder.reshard(value, replicated(value), { stage, backward: true, why, into });
  }
}
