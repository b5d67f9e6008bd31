/** NodeSharder: shards one node after the other. It decides once per form of a node, reshards the operands, emits the op, and places the results. */
import type { DimSpec, Node, Value } from "../../ops/op.ts";
import { Repeats } from "../../repeats.ts";
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
import { nodeForm } from "./nodeForm.ts";
import type { Placements } from "./placements.ts";
import { operandReason, resultReason } from "./reasons.ts";
import { regridDims } from "./regridDims.ts";
import { type Destination, isByPlace, type Resharder } from "./resharder.ts";
import type { ShardStep } from "./steps.ts";

/** What is decided for one node, and for all of its form. */
interface Decision {
  readonly chosen: readonly SubAxisChoice[];
  /** Per dim, the sub-axes that shard it, outermost first. */
  readonly dims: ReadonlyMap<string, readonly number[]>;
  /** The layout that the op needs of each operand. */
  readonly operands: readonly Layout[];
  readonly results: readonly ResultLayout[];
}
/** The layout of a result, and the sub-axes over which ranks with copies of its elements hold addends of it. */
interface ResultLayout {
  readonly layout: Layout;
  readonly copySums: readonly number[];
}

/** Shards one node: chooses dims, and reshards its inputs. */
export class NodeSharder {
  readonly #placements: Placements;
  readonly #resharder: Resharder;
  readonly #pick: Pick | undefined;
  readonly #decisions = new Repeats<Decision>();
  /** Gradients that are partial over ranks with copies of the same elements, and those sub-axes. */
  readonly #copySums = new Map<Value, readonly number[]>();

  constructor(placements: Placements, resharder: Resharder, pick: Pick | undefined) {
    this.#placements = placements;
    this.#resharder = resharder;
    this.#pick = pick;
  }

  /** The number of distinct forms of nodes so far. */
  get forms(): number {
    return this.#decisions.forms;
  }
  /** Returns the sub-axes over which ranks with copies of the elements of a gradient hold addends of it. */
  copySumsOf(v: Value): readonly number[] {
    return this.#copySums.get(v) ?? [];
  }
  /** Records the sub-axes over which ranks with copies of the elements of a gradient hold addends of it. */
  setCopySums(v: Value, subAxes: readonly number[]): void {
    if (subAxes.length > 0) this.#copySums.set(v, [...new Set(subAxes)]);
  }

  /** Emits a node on a virtual stage, after the reshard steps of its operands, and places its results. */
  shard(uses: NodeUses, stage: number, into: ShardStep[]): void {
    const { node } = uses;
    const { mesh } = this.#placements;
    // random choices differ between equal nodes, and the layouts of a regrid are those that the model declares
    const isRepeated = this.#pick === undefined && !node.regrid;
    const decide = (): Decision => this.#decide(uses);
    const decision = isRepeated ? this.#decisions.of(nodeForm(uses, this.#placements, this.#copySums), decide) : decide();
    const { chosen, dims, operands, results } = decision;
    const { backward } = node;
    const ins = pairs(uses.ins, operands).map(([use, want]) =>
      this.#resharder.reshard(use.value, want, {
        ...{ stage, backward, byPlace: isByPlace(node) },
        why: operandReason(mesh, uses, use, chosen),
        into,
      }),
    );
    const outs = pairs(uses.outs, results).map(([{ value }, { layout, copySums }]) => {
      this.setCopySums(value, copySums);
      return this.#placements.place(value, layout, stage);
    });
    if (!node.regrid) into.push({ kind: "compute", stage, node, ins, outs, dims });
    else into.push(...pairs(ins, outs).map(([from, to]) => regridStep(node, stage, from, to)));
  }

  /** Changes the placement of a value to another layout. `byPlace`: as in a destination of the resharder. */
  moveTo(v: Value, layout: Layout, because: string, { backward, byPlace, into }: Omit<Destination, "stage" | "why">): void {
    const { stage } = this.#placements.of(v);
    const why = resultReason(this.#placements.mesh, v.node?.id ?? "", because, v, v);
    this.#placements.place(v, this.#resharder.reshard(v, layout, { stage, backward, byPlace, why, into }).layout, stage);
  }

  #decide(uses: NodeUses): Decision {
    const { node } = uses;
    const regrid = regridDims(uses, this.#placements);
    const chosen = regrid
      ? this.#placements.every.map((f) => ({ f, by: () => "each rank keeps its tokens" }))
      : chooseDims(uses, this.#placements, this.#copySums, this.#pick);
    const dims = regrid ?? orderSubAxes(uses, chosen, this.#placements);
    requireDivisible(node, dims, this.#placements);
    const operands = uses.ins.map((use, i) => this.#placements.unique(this.#operand(node, use, i, chosen, dims)));
    return { chosen, dims, operands, results: uses.outs.map((use) => this.#result(node, use, chosen, dims)) };
  }

  /** Returns the layout that the op needs of an operand. */
  #operand(node: Node, { operand }: OperandUse, index: number, chosen: Decision["chosen"], dims: Decision["dims"]): Layout {
    const dimOf = (s: DimSpec): string => (node.ring?.dim === s.dim ? node.ring.as : s.replicated && !node.regrid ? "" : s.dim);
    return {
      shardedBy: operand.dimSpecs.map((s) => separating(s, node.size, dims.get(dimOf(s)) ?? [], this.#placements)),
      partialSum: chosen.flatMap(({ f, partial, of = index }) => (partial && of === index ? [f] : [])),
      partialMax: [],
    };
  }

  /** Returns the layout of a result: a sub-axis that shards a dim of inputs only makes it partial. */
  #result(node: Node, { operand: { dimSpecs } }: OperandUse, chosen: Decision["chosen"], dims: Decision["dims"]): ResultLayout {
    const dimOf = ({ dim }: DimSpec): string => (node.ring?.dim === dim ? node.ring.as : dim);
    const shardedBy = dimSpecs.map((s) => separating(s, node.size, dims.get(dimOf(s)) ?? [], this.#placements));
    const partial = chosen.flatMap((c) => (c.partial ? [c.f] : []));
    const reduced = chosen.flatMap(({ f, dim }) => (dim && !shardedBy.some((fs) => fs.includes(f)) ? [f] : []));
    const layout: Layout =
      node.op.reduction === "max"
        ? { shardedBy, partialSum: partial, partialMax: reduced }
        : { shardedBy, partialSum: [...partial, ...reduced].sort((a, b) => a - b), partialMax: [] };
    const isShared = (dim: string | undefined): boolean => dimSpecs.some((s) => s.shared !== undefined && s.dim === dim);
    const copySums = chosen.flatMap(({ f, of, dim }) => (layout.partialSum.includes(f) && (of !== undefined || isShared(dim)) ? [f] : []));
    return { layout: this.#placements.unique(layout), copySums };
  }
}

const regridStep = (node: Node, stage: number, from: ShardedValue, to: ShardedValue): ShardStep => ({
  ...{ kind: "collective", how: "regrid", subAxes: [], blockAxes: [], stage, from, to, backward: node.backward },
  why: {
    op: node.id,
    because: "the grids of tokens and experts do not nest, and each rank keeps its tokens",
    path: "parallel",
    position: node.position,
  },
});
