/**
 * The sharding pass: graph and mesh → instructions on sharded values, and the reshard steps between them. The pass names no op, no
 * parameter and no axis.
 *
 * A layout gives per dim of a tensor the sub-axes that shard it, outermost first, and the sub-axes over which a sum or a maximum is
 * pending. Each op assigns to each sub-axis one of its dims. The first rule that applies decides:
 *   0  the model pins the sub-axis
 *   1  all inputs are partial sums and the op is linear: the output is partial
 *   2  the sharding of a parameter, since parameters are never resharded
 *   3  the dim by which all sharded inputs agree
 *   4  a dim of the output (a dim of inputs only would make it partial), then the dim of the first operand
 * One invariant (5) holds: a complete gradient has the layout of its value. Two gradients may be partial: that of a parameter until
 * the end of the step, and that of a value with copies on several ranks, over those ranks, until it reaches a parameter.
 * Every choice gives the same numbers (a law that tests check); the rules decide only the cost.
 */

import { isDisjointSubAxes, shardCount as partsOf } from "../../schemas/sharding.ts";
import { type DimSpec, expand, invariant, type Node, sharersOf, type Value } from "../ops/op.ts";
import { type Graph, idOf } from "./backward.ts";
import {
  continues,
  type Layout,
  layoutKey,
  PARTIAL_MAX,
  PARTIAL_SUM,
  REPLICATED,
  type ReshardKind,
  reshardKind,
  reshardOrder,
  type ShardedValue,
  shardingOf,
} from "./layout.ts";
import { axesName, denseAxes, expertAxes, type Mesh } from "./mesh.ts";

/** The origin of a collective: the use, the sharding decision and the job key. */
interface Reason {
  readonly op: string;
  readonly because: string;
  readonly path: string;
}
/** One instruction of the sharded graph. `stage` is a virtual stage. */
export type ShardStep =
  | {
      kind: "compute";
      stage: number;
      node: Node;
      ins: readonly ShardedValue[];
      outs: readonly ShardedValue[];
      dims: ReadonlyMap<string, readonly number[]>;
    }
  | {
      kind: "collective";
      stage: number;
      how: ReshardKind;
      subAxes: readonly number[];
      from: ShardedValue;
      to: ShardedValue;
      blockAxes: Layout["shardedBy"];
      backward: boolean;
      why: Reason;
    }
  /** A transfer to a neighbouring virtual stage; `received` is the copy there. */
  | { kind: "send"; stage: number; to: number; shardedValue: ShardedValue; received: ShardedValue; backward: boolean; why: Reason }
  /** Adds an addend of a parameter's gradient to its accumulator. */
  | { kind: "accumulate"; stage: number; parameter: Value; shardedValue: ShardedValue };
/** The result of the sharding pass. */
export interface ShardedGraph {
  /** Instructions of one microbatch, in order. */
  readonly steps: readonly ShardStep[];
  /** After all microbatches: the pending reductions of gradients and losses. */
  readonly deferred: readonly ShardStep[];
  /** Per parameter, the reduced gradient, in the layout of the optimizer state: that of the parameter, or sharded further. */
  readonly update: ReadonlyMap<Value, ShardedValue>;
  /** Per parameter, the accumulated gradient before its reduction. */
  readonly accumulated: ReadonlyMap<Value, ShardedValue>;
  /** Per value, the layout and the virtual stage in which it is first produced. */
  readonly placement: ReadonlyMap<Value, { readonly layout: Layout; readonly stage: number }>;
}
/** The dim of an op that a sub-axis shards, or that the output stays partial. */
export interface Choice {
  readonly dim?: string | undefined;
  readonly partial?: true;
  /** The index of the input that stays partial; all inputs if absent. */
  readonly of?: number;
  /** The reason, as the plan states it. */
  readonly by: string;
}
/** Decisions of the job that the pass needs. */
export interface ShardOptions {
  /** Whether optimizer state is sharded over the sub-axes that gradients are summed over. */
  readonly distributedOptimizer: boolean;
  /** Returns the virtual stage of a position of the model. In this file a stage is always a virtual stage. */
  readonly stageOf: (position: number) => number;
  /** Returns the physical stage whose ranks run a virtual stage. */
  readonly roleOf: (stage: number) => number;
  /** Returns whether optimizer state is sharded over a sub-axis; over the other sub-axes it is replicated. */
  readonly shares: (factor: number) => boolean;
  /** Replaces rules 2 to 4; tests use it to try random choices. */
  readonly pick?: (votes: readonly Choice[]) => Choice | undefined;
}

type Operands = ReturnType<typeof expand>;
/** Copies of one value, by stage and layout, and whether each was made in backward. */
type Available = Map<string, { shardedValue: ShardedValue; backward: boolean }>;

/** Shards a graph. Throws an invariant if a dim does not divide by its sub-axes, or if uses of a parameter have different partial sums. */
export function shard(graph: Graph, mesh: Mesh, { distributedOptimizer, shares, stageOf, roleOf, pick }: ShardOptions): ShardedGraph {
  const every = mesh.subAxes.map((_, f) => f);
  const parts = (fs: readonly number[]) => partsOf(mesh, fs);
  const placement = new Map<Value, { layout: Layout; stage: number }>();
  const steps: ShardStep[] = [];
  /** Per value, the copies that exist. */
  const copiesMade = new Map<Value, Available>();

  const replicated = (v: Value): Layout => ({ shardedBy: v.sizes.map(() => []), partialSum: [], partialMax: [] });
  const shardingBy = (axesOfDims: NonNullable<Value["shardAxes"]>): Layout["shardedBy"] =>
    axesOfDims.map((axes) => axes.flatMap((a) => mesh.axes[a]!.toReversed()));
  const declaredLayout = (v: Value): Layout => ({ ...replicated(v), shardedBy: shardingBy(v.shardAxes!) });
  /** Throws an invariant if layouts of a value use sub-axes of both grids where the grids do not nest. */
  const requireOneGrid = (v: Value, ...layouts: readonly Layout[]) => {
    const fs = [...new Set(layouts.flatMap((l) => [...l.shardedBy.flat(), ...l.partialSum, ...l.partialMax]))];
    invariant(
      isDisjointSubAxes(mesh, fs),
      `${idOf(v)} would be sharded by ${axesName(mesh, fs, false)}, which are of grids that do not nest`,
    );
  };
  /** Records the placement of a value. */
  const setPlacement = (v: Value, layout: Layout, stage: number) => {
    requireOneGrid(v, layout);
    for (const [slot, fs] of layout.shardedBy.entries())
      invariant(v.sizes[slot]! % parts(fs) === 0, `${idOf(v)}: dim ${slot} of ${v.sizes[slot]} elements does not divide by ${parts(fs)}`);
    placement.set(v, { layout, stage });
  };
  for (const v of graph.order.flatMap((n) => n.args))
    if (v.leaf && !placement.has(v)) setPlacement(v, declaredLayout(v), stageOf(v.leaf.position));

  /** Returns the job key that set the size of a sub-axis, for the origin of a collective. */
  const pathOf = (fs: readonly number[], expert: boolean): string => {
    const f = fs[0];
    const grids = expert ? [...expertAxes, ...denseAxes] : [...denseAxes, ...expertAxes];
    const axis = f === undefined ? undefined : grids.find((a) => mesh.axes[a]!.includes(f));
    return axis ? keyOfAxis[axis]! : "parallel";
  };

  /** Gradients that are partial over ranks with copies of the same elements, and those sub-axes. They may stay partial until they reach a parameter. */
  const copiesOf = new Map<Value, readonly number[]>();

  /** Applies the rules 0 to 4 to one op and one sub-axis. */
  function choose(node: Node, f: number, { inputs, outputs }: Operands): Choice {
    const of = node.args.findIndex((v, i) => copiesOf.get(v)?.includes(f) && node.op.linearIn === inputs[i]!.name);
    if (of >= 0) return { partial: true, of, by: "copies owe a sum" };
    if (node.pin && mesh.axes[node.pin.axis]!.includes(f))
      return { dim: node.pin.dim, by: `the model pins ${node.pin.dim ?? "no dim"} at ${node.pin.axis} (${node.pin.path})` };
    const at = node.args.map((v) => shardingOf(placement.get(v)!.layout, f));
    if (node.op.linear && at.every((p) => p === PARTIAL_SUM)) return { partial: true, by: "all inputs owe a sum" };
    const votes = node.args.flatMap((v, i) => {
      const slot = inputs[i]!.dimSpecs[at[i]!];
      if (!slot || slot.replicated) return [];
      const parameter = v.leaf?.kind === "parameter";
      return [
        { parameter, dim: slot.dim, by: `${parameter ? v.leaf!.name : inputs[i]!.name} is cut along ${slot.dim.replace("#", "dim ")}` },
      ];
    });
    const picked = pick?.(votes);
    if (picked) return picked;
    const weight = votes.find((x) => x.parameter);
    if (weight) return weight;
    if (new Set(votes.map((x) => x.dim)).size < 2)
      return (
        votes[0] ?? {
          by: at.includes(PARTIAL_SUM) || at.includes(PARTIAL_MAX) ? "a part is owed, and it needs the whole" : "nothing cuts it",
        }
      );
    return votes.find((x) => outputs[0]!.dimSpecs.some((s) => s.dim === x.dim)) ?? votes[0]!;
  }

  /** Returns the sub-axes of each dim, outermost first: in the order of a parameter, else of the operand with the most; then by stride. */
  function orderSubAxes(node: Node, chosen: readonly Choice[], { inputs }: Operands): Map<string, number[]> {
    const dims = new Map<string, number[]>();
    for (const dim of new Set(chosen.flatMap((c) => c.dim ?? []))) {
      const mine = every.filter((f) => chosen[f]!.dim === dim).reverse();
      const seen = node.args
        .flatMap((v, i) => {
          const slot = inputs[i]!.dimSpecs.findIndex((s) => s.dim === dim);
          return slot < 0 ? [] : [{ weight: v.leaf?.kind === "parameter", fs: placement.get(v)!.layout.shardedBy[slot]! }];
        })
        .sort((a, b) => Number(b.weight) - Number(a.weight) || b.fs.length - a.fs.length)
        .flatMap((x) => x.fs);
      dims.set(dim, [...new Set([...seen.filter((f) => mine.includes(f)), ...mine])]);
    }
    return dims;
  }

  /** Returns the sub-axes of a dim that separate its elements, without those whose neighbouring ranks share one element. */
  const separating = (s: DimSpec, size: Node["size"], fs: readonly number[]): readonly number[] => {
    const elements = size[s.dim]! / sharersOf(s, size);
    return s.shared === undefined ? fs : fs.filter((_, i) => elements % parts(fs.slice(0, i + 1)) === 0);
  };

  /** Returns the sub-axes of each dim of a regrid. Each grid must give every rank of a stage its own block, of the same size in both. */
  function regridDims(node: Node, { inputs, outputs }: Operands): Map<string, readonly number[]> | undefined {
    if (!node.regrid) return undefined;
    const [from, to] = [shardingBy(node.regrid.from), shardingBy(node.regrid.to)];
    for (const shardedBy of [from, to])
      invariant(
        isDisjointSubAxes(mesh, shardedBy.flat()) && parts(shardedBy.flat()) === mesh.per_stage,
        `${node.id}: two ranks would have the same tokens`,
      );
    for (const [slot, n] of node.args[0]!.sizes.entries())
      invariant(
        n / parts(from[slot]!) === node.outs[0]!.sizes[slot]! / parts(to[slot]!),
        `${node.id}: the local size of dim ${slot} differs between the grids`,
      );
    const dims = (dimSpecs: readonly DimSpec[], shardedBy: Layout["shardedBy"]) => dimSpecs.map((s, i) => [s.dim, shardedBy[i]!] as const);
    return new Map([...dims(inputs[0]!.dimSpecs, from), ...dims(outputs[0]!.dimSpecs, to)]);
  }

  /** Per value, for each physical stage the virtual stage that first has a copy. Copies of later virtual stages get a note. */
  const copies = new Map<Value, Map<number, number>>();
  const copyNote = (v: Value, stage: number): string => {
    const holders = copies.get(v) ?? new Map([[roleOf(placement.get(v)!.stage), placement.get(v)!.stage]]);
    copies.set(v, holders);
    const holder = holders.get(roleOf(stage)) ?? stage;
    holders.set(roleOf(stage), holder);
    return holder === stage ? "" : `.v${stage}`;
  };

  /** Sends a value from its virtual stage to another through all stages between: a stage receives from its neighbours only. */
  function deliver(v: Value, stage: number, known: Available, backward: boolean, why: Reason, into: ShardStep[]): ShardedValue {
    const at = placement.get(v)!;
    let shardedValue: ShardedValue = { value: v, layout: at.layout };
    // every stage has the inputs; all chunks of a rank share its parameters
    if (v.leaf?.kind === "input" || (v.leaf && roleOf(at.stage) === roleOf(stage))) return shardedValue;
    const direction = Math.sign(stage - at.stage);
    for (let from = at.stage; from !== stage; from += direction) {
      const to = from + direction;
      const note = copyNote(v, to);
      const received: ShardedValue = { value: v, layout: at.layout, ...(note ? { note } : {}) };
      const key = `${to}|${layoutKey(received)}`;
      if (!known.has(key)) {
        into.push({ kind: "send", stage: from, to, shardedValue, received, backward, why });
        known.set(key, { shardedValue: received, backward });
      }
      shardedValue = received;
    }
    return shardedValue;
  }

  /**
   * Makes a value available on a stage in a layout: emits transfers, then reshard steps. Each copy is made once; all-gathers are
   * repeated in backward, so that gathered values do not stay in memory. Returns the copy.
   */
  function reshard(
    v: Value,
    want: Layout,
    stage: number,
    backward: boolean,
    why: (changed: readonly number[]) => Reason,
    into: ShardStep[],
  ): ShardedValue {
    const at = placement.get(v)!;
    const known: Available = copiesMade.get(v) ?? new Map();
    copiesMade.set(v, known);
    const because = { because: "the next layer is on another stage", path: "parallel.pipeline" };
    const start = deliver(v, stage, known, backward, { ...why([]), ...because }, into);
    const copy = copyNote(v, stage);
    const reordered = at.layout.shardedBy.map((fs, slot) => !continues(fs, want.shardedBy[slot]!) && !continues(want.shardedBy[slot]!, fs));
    if (!reordered.some(Boolean)) return reshardFrom(start, want);
    // sub-axes of a dim change their order: gather that dim first
    return reshardFrom(
      reshardFrom(start, { ...at.layout, shardedBy: at.layout.shardedBy.map((fs, slot) => (reordered[slot] ? [] : fs)) }),
      want,
    );

    function reshardFrom(first: ShardedValue, target: Layout): ShardedValue {
      requireOneGrid(v, first.layout, target);
      let shardedValue = first;
      const blockAxes = first.layout.shardedBy.map((fs, slot) =>
        fs.length > target.shardedBy[slot]!.length ? fs : target.shardedBy[slot]!,
      );
      for (const how of reshardOrder) {
        const subAxes = every.filter((f) => reshardKind(shardingOf(first.layout, f), shardingOf(target, f)) === how);
        if (!subAxes.length) continue;
        const now = (f: number) => shardingOf(subAxes.includes(f) ? target : shardedValue.layout, f);
        const layout: Layout = {
          shardedBy: blockAxes.map((fs, slot) => fs.filter((f) => now(f) === slot)),
          partialSum: every.filter((f) => now(f) === PARTIAL_SUM),
          partialMax: every.filter((f) => now(f) === PARTIAL_MAX),
        };
        // blocks are numbered by sub-axes that do not shard the dim: the layout alone does not identify the copy
        const halfway = layout.shardedBy.every((fs, slot) => continues(fs, blockAxes[slot]!))
          ? ""
          : `~${blockAxes.map((c) => c.join(".")).join(",")}`;
        const source = shardedValue.note?.includes("again") ? ".again" : "";
        const note = copy + halfway + source;
        const to: ShardedValue = { value: v, layout, ...(note ? { note } : {}) };
        const key = `${stage}|${layoutKey(to)}`;
        const before = known.get(key);
        if (before && (how !== "all_gather" || before.backward === backward)) {
          shardedValue = before.shardedValue;
          continue;
        }
        const fresh: ShardedValue = before ? { ...to, note: `${note}.again` } : to;
        into.push({ kind: "collective", stage, how, subAxes, from: shardedValue, to: fresh, blockAxes, backward, why: why(subAxes) });
        known.set(key, { shardedValue: fresh, backward });
        shardedValue = fresh;
      }
      return shardedValue;
    }
  }

  const accumulated = new Map<Value, ShardedValue>();
  for (const node of graph.order) {
    const stage = stageOf(node.position);
    const operands = expand(node);
    const { inputs, outputs } = operands;
    const { size } = node;
    const regrid = regridDims(node, operands);
    const chosen = every.map((f) => (regrid ? { by: "each rank keeps its tokens" } : choose(node, f, operands)));
    const dims = regrid ?? orderSubAxes(node, chosen, operands);
    for (const [dim, fs] of dims)
      invariant(size[dim]! % parts(fs) === 0, `${node.id}: ${dim} of ${size[dim]} elements does not divide by ${parts(fs)}`);
    const partial = every.filter((f) => chosen[f]!.partial);
    const shardingOfDim = (s: DimSpec): readonly number[] =>
      separating(s, size, dims.get(node.ring?.dim === s.dim ? node.ring.as : s.replicated && !regrid ? "" : s.dim) ?? []);
    const ins = node.args.map((v, i) => {
      const partialSum = partial.filter((f) => (chosen[f]!.of ?? i) === i);
      const want: Layout = { shardedBy: inputs[i]!.dimSpecs.map(shardingOfDim), partialSum, partialMax: [] };
      const why = (fs: readonly number[]): Reason => ({
        op: `${node.id}.${inputs[i]!.name}`,
        because: [
          ...new Set(
            fs.map((f) =>
              chosen[f]!.dim && inputs[i]!.dimSpecs.some((s) => s.dim === chosen[f]!.dim && s.replicated)
                ? `${chosen[f]!.dim} is read whole`
                : chosen[f]!.by,
            ),
          ),
        ].join("; "),
        path: pathOf(fs, v.ragged > 0),
      });
      return reshard(v, want, stage, node.backward, why, steps);
    });
    const outs = node.outs.map((value, i): ShardedValue => {
      const shardedBy = outputs[i]!.dimSpecs.map((s) =>
        node.ring?.dim === s.dim ? shardingOfDim(s) : separating(s, size, dims.get(s.dim) ?? []),
      );
      const gone = every.filter((f) => chosen[f]!.dim && !shardedBy.some((fs) => fs.includes(f)));
      const layout: Layout =
        node.op.reduction === "max"
          ? { shardedBy, partialSum: partial, partialMax: gone }
          : { shardedBy, partialSum: [...partial, ...gone].sort((a, b) => a - b), partialMax: [] };
      setPlacement(value, layout, stage);
      const between = (f: number) => outputs[i]!.dimSpecs.some((s) => s.shared !== undefined && s.dim === chosen[f]!.dim);
      const copied = layout.partialSum.filter((f) => chosen[f]!.of !== undefined || between(f));
      if (copied.length) copiesOf.set(value, copied);
      return { value, layout };
    });
    if (regrid) {
      const why = { op: node.id, because: "the grids of tokens and experts do not nest, and each rank keeps its tokens", path: "parallel" };
      steps.push({
        kind: "collective",
        stage,
        how: "regrid",
        subAxes: [],
        from: ins[0]!,
        to: outs[0]!,
        blockAxes: [],
        backward: node.backward,
        why,
      });
    } else steps.push({ kind: "compute", stage, node, ins, outs, dims });
    for (const v of node.outs) {
      const moveTo = (layout: Layout, because: string) =>
        setPlacement(
          v,
          reshard(v, layout, stage, node.backward, (fs) => ({ op: node.id, because, path: pathOf(fs, v.ragged > 0) }), steps).layout,
          stage,
        );
      if (v.shardAxes) moveTo(declaredLayout(v), "the model lays it so");
      const of = graph.gradOf.get(v);
      if (!of) continue;
      const { layout } = placement.get(of)!;
      const parameter = of.leaf?.kind === "parameter";
      if (!parameter && graph.grad.get(of) !== v) continue;
      const staysPartial = every.filter((f) => {
        const allowed = parameter || copiesOf.get(v)?.includes(f) ? [REPLICATED] : [PARTIAL_SUM, PARTIAL_MAX];
        return shardingOf(placement.get(v)!.layout, f) === PARTIAL_SUM && allowed.includes(shardingOf(layout, f));
      });
      moveTo({ ...layout, partialSum: staysPartial, partialMax: [] }, `the gradient of ${idOf(of)} lies as it does`);
      if (!parameter) continue;
      const shardedValue: ShardedValue = { value: v, layout: placement.get(v)!.layout };
      steps.push({ kind: "accumulate", stage, parameter: of, shardedValue });
      const first = accumulated.get(of);
      invariant(!first || layoutKey(first) === layoutKey(shardedValue), `${idOf(of)}: its uses have different partial sums`);
      if (!first) accumulated.set(of, shardedValue);
    }
  }

  const deferred: ShardStep[] = [];
  const update = new Map<Value, ShardedValue>();
  for (const p of graph.parameters) {
    const shardedValue = accumulated.get(p)!;
    const { layout } = placement.get(p)!;
    // the gradient of a parameter that several chunks use is on the stage of the last one
    const { stage } = placement.get(shardedValue.value)!;
    const partial = shardedValue.layout.partialSum.toReversed();
    // pending sub-axes shard a dim that they divide, by a reduce-scatter; if none divides, an all-reduce
    const shared = partial.filter(shares);
    // parameters with a custom update rule (expert bias) need the full count, so they are not sharded
    const isScattered = distributedOptimizer && !p.leaf!.rule;
    const slot = isScattered ? p.sizes.findIndex((n, i) => n % parts([...layout.shardedBy[i]!, ...shared]) === 0) : -1;
    const target: Layout = { ...layout, shardedBy: layout.shardedBy.map((fs, i) => (i === slot ? [...fs, ...shared] : fs)) };
    const expert =
      partial.length > 0 &&
      mesh.axes.edp!.join() === shardedValue.layout.partialSum.join() &&
      layout.shardedBy.flat().some((f) => mesh.axes.ep!.includes(f) || mesh.axes.etp!.includes(f));
    const why = (fs: readonly number[]): Reason => ({
      op: `gradient of ${idOf(p)}`,
      because: "each rank saw other tokens",
      path: pathOf(fs, expert),
    });
    update.set(p, reshard(shardedValue.value, target, stage, true, why, deferred));
  }
  const reduced = new Set<string>();
  for (const { name, value } of graph.losses) {
    const { layout, stage } = placement.get(value)!;
    const key = `${name}|${roleOf(stage)}|${layoutKey({ value, layout })}`;
    if (reduced.has(key)) continue; // losses with equal names and layouts share an accumulator
    reduced.add(key);
    reshard(
      value,
      replicated(value),
      stage,
      true,
      (fs) => ({ op: name, because: "each rank saw other tokens", path: pathOf(fs, false) }),
      deferred,
    );
  }
  return { steps, deferred, update, accumulated, placement };
}

/** The job key that sets the size of each axis. */
const keyOfAxis: Readonly<Record<string, string>> = {
  tp: "parallel.tensor",
  cp: "parallel.context",
  dp: "parallel.data",
  etp: "parallel.expert_tensor",
  ep: "parallel.expert",
  edp: "parallel.data",
};
