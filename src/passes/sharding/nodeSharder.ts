/** NodeSharder: shards one node after the other. It reshards the operands, emits the op, and places the results. */
import type { DimSpec, Value } from "../../ops/op.ts";
import { type Layout, pairs, type ShardedValue } from "../layout.ts";
import {
  chooseDims,
  type NodeUses,
  type OperandUse,
  orderSubAxes,
  type Pick,
  requireDivisible,
  type SubAxisChoice,
  separating,
} from "./dimChoice.ts";
import type { Placements } from "./placements.ts";
import { operandReason, resultReason } from "./reasons.ts";
import { regridDims } from "./regridDims.ts";
import type { Resharder } from "./resharder.ts";
import type { ShardStep } from "./steps.ts";

/** The decisions for one node. */
interface Sharding extends NodeUses {
  readonly stage: number;
  readonly chosen: readonly SubAxisChoice[];
  /** Per dim, the sub-axes that shard it, outermost first. */
  readonly dims: ReadonlyMap<string, readonly number[]>;
}

/** Shards one node: chooses dims, and reshards its inputs. */
export class NodeSharder {
  readonly #placements: Placements;
  readonly #resharder: Resharder;
  readonly #pick: Pick | undefined;
  /** Gradients that are partial over ranks with copies of the same elements, and those sub-axes. */
  readonly #copySums = new Map<Value, readonly number[]>();

  constructor(placements: Placements, resharder: Resharder, pick: Pick | undefined) {
    this.#placements = placements;
    this.#resharder = resharder;
    this.#pick = pick;
  }

  /** Returns the sub-axes over which ranks with copies of the elements of a gradient hold addends of it. */
  copySumsOf(v: Value): readonly number[] {
    return this.#copySums.get(v) ?? [];
  }

  /** Emits a node on a virtual stage, after the reshard steps of its operands, and places its results. */
  shard(uses: NodeUses, stage: number, into: ShardStep[]): void {
    const { node } = uses;
    const regrid = regridDims(uses, this.#placements);
    const chosen = regrid
      ? this.#placements.every.map((f) => ({ f, by: "each rank keeps its tokens" }))
      : chooseDims(uses, this.#placements, this.#copySums, this.#pick);
    const dims = regrid ?? orderSubAxes(uses, chosen, this.#placements);
    requireDivisible(node, dims, this.#placements);
    const sharding = { ...uses, stage, chosen, dims };
    const ins = uses.ins.map((use, i) => this.#operand(sharding, use, i, into));
    const outs = uses.outs.map((use) => this.#result(sharding, use));
    if (!regrid) into.push({ kind: "compute", stage, node, ins, outs, dims });
    else into.push(...pairs(ins, outs).map(([from, to]) => regridStep(sharding, from, to)));
  }

  /** Changes the placement of a value to another layout. */
  moveTo(v: Value, layout: Layout, because: string, backward: boolean, into: ShardStep[]): void {
    const { stage } = this.#placements.of(v);
    const why = resultReason(this.#placements.mesh, v.node?.id ?? "", because, v, v);
    this.#placements.place(v, this.#resharder.reshard(v, layout, { stage, backward, why, into }).layout, stage);
  }

  /** Reshards an operand to the layout that the op needs. */
  #operand(sharding: Sharding, use: OperandUse, index: number, into: ShardStep[]): ShardedValue {
    const { node, stage, chosen, dims } = sharding;
    const dimOf = (s: DimSpec): string => (node.ring?.dim === s.dim ? node.ring.as : s.replicated && !node.regrid ? "" : s.dim);
    const want: Layout = {
      shardedBy: use.operand.dimSpecs.map((s) => separating(s, node.size, dims.get(dimOf(s)) ?? [], this.#placements)),
      partialSum: chosen.flatMap(({ f, partial, of = index }) => (partial && of === index ? [f] : [])),
      partialMax: [],
    };
    const why = operandReason(this.#placements.mesh, sharding, use, chosen);
    return this.#resharder.reshard(use.value, want, { stage, backward: node.backward, why, into });
  }

  /** Places a result: a sub-axis that shards a dim of inputs only makes it partial. */
  #result({ node, stage, chosen, dims }: Sharding, { operand: { dimSpecs }, value }: OperandUse): ShardedValue {
    const dimOf = ({ dim }: DimSpec): string => (node.ring?.dim === dim ? node.ring.as : dim);
    const shardedBy = dimSpecs.map((s) => separating(s, node.size, dims.get(dimOf(s)) ?? [], this.#placements));
    const partial = chosen.flatMap((c) => (c.partial ? [c.f] : []));
    const reduced = chosen.flatMap(({ f, dim }) => (dim && !shardedBy.some((fs) => fs.includes(f)) ? [f] : []));
    const layout: Layout =
      node.op.reduction === "max"
        ? { shardedBy, partialSum: partial, partialMax: reduced }
        : { shardedBy, partialSum: [...partial, ...reduced].sort((a, b) => a - b), partialMax: [] };
    this.#placements.place(value, layout, stage);
    const isShared = (dim: string | undefined): boolean => dimSpecs.some((s) => s.shared !== undefined && s.dim === dim);
    const copySums = chosen.flatMap(({ f, of, dim }) => (layout.partialSum.includes(f) && (of !== undefined || isShared(dim)) ? [f] : []));
    if (copySums.length) this.#copySums.set(value, copySums);
    return { value, layout };
  }
}

const regridStep = ({ node, stage }: Sharding, from: ShardedValue, to: ShardedValue): ShardStep => ({
  ...{ kind: "collective", how: "regrid", subAxes: [], blockAxes: [], stage, from, to, backward: node.backward },
  why: {
    op: node.id,
    because: "the grids of tokens and experts do not nest, and each rank keeps its tokens",
    path: "parallel",
    position: node.position,
  },
});
