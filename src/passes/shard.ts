/**
 * shard: Graph × Mesh → instructions on pieces, and the moves between them. It names no op, no parameter and no axis.
 *
 * A layout says, per slot of a tensor, which factors of the mesh cut it, outermost first, and over which factors a sum
 * or a maximum is owed. Each op gives each factor one of its dims, by the first rule that speaks:
 *   0  the model pins it
 *   1  all inputs owe a sum and the op is linear: the sum stays owed
 *   2  the cut of a parameter: parameters do not move
 *   3  what its cut inputs agree on
 *   4  a dim of the output before one that would owe a sum, then the first operand's
 * and one invariant (5): a complete gradient lies as its value lies; only a parameter's may owe sums, to the end of the step, and
 * that of a value of which ranks have copies, over the copies, to the parameter's.
 * Any choice gives the same numbers (the cut law); the rules decide only the cost.
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

interface Reason {
  readonly op: string;
  readonly because: string;
  readonly path: string;
}
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
  /** From a virtual stage to the one beside it; `received` is the copy there. */
  | { kind: "send"; stage: number; to: number; shardedValue: ShardedValue; received: ShardedValue; backward: boolean; why: Reason }
  /** A part of a parameter's gradient is complete for this microbatch, and is added up. */
  | { kind: "accumulate"; stage: number; parameter: Value; shardedValue: ShardedValue };
export interface ShardedGraph {
  readonly steps: readonly ShardStep[];
  /** After all microbatches: what each parameter's gradient, and each loss, still owes. */
  readonly deferred: readonly ShardStep[];
  /** How each parameter's reduced gradient and optimizer state lie: as the parameter, or scattered. */
  readonly update: ReadonlyMap<Value, ShardedValue>;
  /** How each parameter's accumulated gradient lies before it is reduced. */
  readonly accumulated: ReadonlyMap<Value, ShardedValue>;
  readonly placement: ReadonlyMap<Value, { readonly layout: Layout; readonly stage: number }>;
}
export interface Choice {
  readonly dim?: string | undefined;
  readonly partial?: true;
  /** The one input whose sum stays owed; all of them if absent. */
  readonly of?: number;
  readonly by: string;
}
export interface ShardOptions {
  readonly distributedOptimizer: boolean;
  /** The virtual stage of a position of the model; a stage below is always a virtual one. */
  readonly stageOf: (position: number) => number;
  /** The stage whose ranks run a virtual one. */
  readonly roleOf: (stage: number) => number;
  /** Of gradients summed over several factors, those that share the optimizer's state out; over the others it is kept again. */
  readonly shares: (factor: number) => boolean;
  /** Laws answer in place of the rules. */
  readonly pick?: (votes: readonly Choice[]) => Choice | undefined;
}

type Operands = ReturnType<typeof expand>;
/** Key of stage and layout → the piece, and in which direction it was made. */
type Available = Map<string, { shardedValue: ShardedValue; backward: boolean }>;

export function shard(graph: Graph, mesh: Mesh, { distributedOptimizer, shares, stageOf, roleOf, pick }: ShardOptions): ShardedGraph {
  const every = mesh.subAxes.map((_, f) => f);
  const parts = (fs: readonly number[]) => partsOf(mesh, fs);
  const placement = new Map<Value, { layout: Layout; stage: number }>();
  const steps: ShardStep[] = [];
  /** Pieces that exist, per value. */
  const made = new Map<Value, Available>();

  const wholeOf = (v: Value): Layout => ({ shardedBy: v.sizes.map(() => []), partialSum: [], partialMax: [] });
  const cutsBy = (cut: NonNullable<Value["shardAxes"]>): Layout["shardedBy"] =>
    cut.map((axes) => axes.flatMap((a) => mesh.axes[a]!.toReversed()));
  const declared = (v: Value): Layout => ({ ...wholeOf(v), shardedBy: cutsBy(v.shardAxes!) });
  /** A value lies by one grid at a time: the factors of another that does not nest with it mean nothing beside its own. */
  const inOneGrid = (v: Value, ...layouts: readonly Layout[]) => {
    const fs = [...new Set(layouts.flatMap((l) => [...l.shardedBy.flat(), ...l.partialSum, ...l.partialMax]))];
    invariant(isDisjointSubAxes(mesh, fs), `${idOf(v)} would be cut by ${axesName(mesh, fs, false)}, of grids that do not nest`);
  };
  const settle = (v: Value, layout: Layout, stage: number) => {
    inOneGrid(v, layout);
    for (const [slot, fs] of layout.shardedBy.entries())
      invariant(v.sizes[slot]! % parts(fs) === 0, `${idOf(v)}: slot ${slot} of ${v.sizes[slot]} over ${parts(fs)}`);
    placement.set(v, { layout, stage });
  };
  for (const v of graph.order.flatMap((n) => n.args)) if (v.leaf && !placement.has(v)) settle(v, declared(v), stageOf(v.leaf.position));

  /** The job key that set a factor, for the origin of a collective. */
  const pathOf = (fs: readonly number[], expert: boolean): string => {
    const f = fs[0];
    const grids = expert ? [...expertAxes, ...denseAxes] : [...denseAxes, ...expertAxes];
    const axis = f === undefined ? undefined : grids.find((a) => mesh.axes[a]!.includes(f));
    return axis ? keyOfAxis[axis]! : "parallel";
  };

  /** Gradients that owe a sum over ranks with copies of the same elements, and those factors. It may stay owed until a parameter's gradient. */
  const copiesOf = new Map<Value, readonly number[]>();

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

  /** The factors of each dim, outermost first: as the operand that is cut most along it has them (a parameter first), then larger strides. */
  function nest(node: Node, chosen: readonly Choice[], { inputs }: Operands): Map<string, number[]> {
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

  /** Of the factors that cut a dim, those that cut a slot of it: not those between neighbours that share an element. */
  const apart = (s: DimSpec, size: Node["size"], fs: readonly number[]): readonly number[] => {
    const elements = size[s.dim]! / sharersOf(s, size);
    return s.shared === undefined ? fs : fs.filter((_, i) => elements % parts(fs.slice(0, i + 1)) === 0);
  };

  /** The factors of each dim around a fold. Both grids tell all ranks of a stage apart, and a rank has as much of each dim in both. */
  function foldOf(node: Node, { inputs, outputs }: Operands): Map<string, readonly number[]> | undefined {
    if (!node.regrid) return undefined;
    const [from, to] = [cutsBy(node.regrid.from), cutsBy(node.regrid.to)];
    for (const shardedBy of [from, to])
      invariant(
        isDisjointSubAxes(mesh, shardedBy.flat()) && parts(shardedBy.flat()) === mesh.per_stage,
        `${node.id}: two ranks would have the same tokens`,
      );
    for (const [slot, n] of node.args[0]!.sizes.entries())
      invariant(
        n / parts(from[slot]!) === node.outs[0]!.sizes[slot]! / parts(to[slot]!),
        `${node.id}: a rank has other sizes in slot ${slot}`,
      );
    const dims = (dimSpecs: readonly DimSpec[], shardedBy: Layout["shardedBy"]) => dimSpecs.map((s, i) => [s.dim, shardedBy[i]!] as const);
    return new Map([...dims(inputs[0]!.dimSpecs, from), ...dims(outputs[0]!.dimSpecs, to)]);
  }

  /** What tells the pieces of a value at a virtual stage apart from those at an earlier one of the same ranks: they live in other chunks. */
  const copies = new Map<Value, Map<number, number>>();
  const copyNote = (v: Value, stage: number): string => {
    const holders = copies.get(v) ?? new Map([[roleOf(placement.get(v)!.stage), placement.get(v)!.stage]]);
    copies.set(v, holders);
    const holder = holders.get(roleOf(stage)) ?? stage;
    holders.set(roleOf(stage), holder);
    return holder === stage ? "" : `.v${stage}`;
  };

  /** Sends a value from the virtual stage that has it to another, by way of those between: a stage receives from its neighbours alone. */
  function deliver(v: Value, stage: number, known: Available, backward: boolean, why: Reason, into: ShardStep[]): ShardedValue {
    const at = placement.get(v)!;
    let shardedValue: ShardedValue = { value: v, layout: at.layout };
    // an input is there on every stage, a parameter in all chunks of its ranks
    if (v.leaf?.kind === "input" || (v.leaf && roleOf(at.stage) === roleOf(stage))) return shardedValue;
    const way = Math.sign(stage - at.stage);
    for (let from = at.stage; from !== stage; from += way) {
      const to = from + way;
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

  /** Makes a value available at a stage in a layout: sent if need be, then moved; each piece once (all-gathers once per direction). */
  function bring(
    v: Value,
    want: Layout,
    stage: number,
    backward: boolean,
    why: (changed: readonly number[]) => Reason,
    into: ShardStep[],
  ): ShardedValue {
    const at = placement.get(v)!;
    const known: Available = made.get(v) ?? new Map();
    made.set(v, known);
    const because = { because: "the next layer is on another stage", path: "parallel.pipeline" };
    const start = deliver(v, stage, known, backward, { ...why([]), ...because }, into);
    const copy = copyNote(v, stage);
    const crossed = at.layout.shardedBy.map((fs, slot) => !continues(fs, want.shardedBy[slot]!) && !continues(want.shardedBy[slot]!, fs));
    if (!crossed.some(Boolean)) return go(start, want);
    // a factor would cross another that stays: by way of whole
    return go(go(start, { ...at.layout, shardedBy: at.layout.shardedBy.map((fs, slot) => (crossed[slot] ? [] : fs)) }), want);

    function go(first: ShardedValue, target: Layout): ShardedValue {
      inOneGrid(v, first.layout, target);
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
        // counted in blocks of factors that do not cut it: no layout of its own
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
    const regrid = foldOf(node, operands);
    const chosen = every.map((f) => (regrid ? { by: "each rank keeps its tokens" } : choose(node, f, operands)));
    const dims = regrid ?? nest(node, chosen, operands);
    for (const [dim, fs] of dims) invariant(size[dim]! % parts(fs) === 0, `${node.id}: ${dim} of ${size[dim]} over ${parts(fs)}`);
    const partial = every.filter((f) => chosen[f]!.partial);
    const cutOf = (s: DimSpec): readonly number[] =>
      apart(s, size, dims.get(node.ring?.dim === s.dim ? node.ring.as : s.replicated && !regrid ? "" : s.dim) ?? []);
    const ins = node.args.map((v, i) => {
      const partialSum = partial.filter((f) => (chosen[f]!.of ?? i) === i);
      const want: Layout = { shardedBy: inputs[i]!.dimSpecs.map(cutOf), partialSum, partialMax: [] };
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
      return bring(v, want, stage, node.backward, why, steps);
    });
    const outs = node.outs.map((value, i): ShardedValue => {
      const shardedBy = outputs[i]!.dimSpecs.map((s) => (node.ring?.dim === s.dim ? cutOf(s) : apart(s, size, dims.get(s.dim) ?? [])));
      const gone = every.filter((f) => chosen[f]!.dim && !shardedBy.some((fs) => fs.includes(f)));
      const layout: Layout =
        node.op.reduction === "max"
          ? { shardedBy, partialSum: partial, partialMax: gone }
          : { shardedBy, partialSum: [...partial, ...gone].sort((a, b) => a - b), partialMax: [] };
      settle(value, layout, stage);
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
      const rehome = (layout: Layout, because: string) =>
        settle(
          v,
          bring(v, layout, stage, node.backward, (fs) => ({ op: node.id, because, path: pathOf(fs, v.ragged > 0) }), steps).layout,
          stage,
        );
      if (v.shardAxes) rehome(declared(v), "the model lays it so");
      const of = graph.gradOf.get(v);
      if (!of) continue;
      const { layout } = placement.get(of)!;
      const parameter = of.leaf?.kind === "parameter";
      if (!parameter && graph.grad.get(of) !== v) continue;
      const still = every.filter((f) => {
        const mayOwe = parameter || copiesOf.get(v)?.includes(f) ? [REPLICATED] : [PARTIAL_SUM, PARTIAL_MAX];
        return shardingOf(placement.get(v)!.layout, f) === PARTIAL_SUM && mayOwe.includes(shardingOf(layout, f));
      });
      rehome({ ...layout, partialSum: still, partialMax: [] }, `the gradient of ${idOf(of)} lies as it does`);
      if (!parameter) continue;
      const shardedValue: ShardedValue = { value: v, layout: placement.get(v)!.layout };
      steps.push({ kind: "accumulate", stage, parameter: of, shardedValue });
      const first = accumulated.get(of);
      invariant(!first || layoutKey(first) === layoutKey(shardedValue), `${idOf(of)}: its uses owe different sums`);
      if (!first) accumulated.set(of, shardedValue);
    }
  }

  const deferred: ShardStep[] = [];
  const update = new Map<Value, ShardedValue>();
  for (const p of graph.parameters) {
    const shardedValue = accumulated.get(p)!;
    const { layout } = placement.get(p)!;
    // a parameter that several chunks use has its gradient where the last of them adds to it
    const { stage } = placement.get(shardedValue.value)!;
    const partial = shardedValue.layout.partialSum.toReversed();
    // the owed factors join a dim they divide: a reduce-scatter; where none fits, an all-reduce
    const shared = partial.filter(shares);
    // what goes by a count of its own rule needs all of it
    const joins = distributedOptimizer && !p.leaf!.rule;
    const slot = joins ? p.sizes.findIndex((n, i) => n % parts([...layout.shardedBy[i]!, ...shared]) === 0) : -1;
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
    update.set(p, bring(shardedValue.value, target, stage, true, why, deferred));
  }
  const reduced = new Set<string>();
  for (const { name, value } of graph.losses) {
    const { layout, stage } = placement.get(value)!;
    const key = `${name}|${roleOf(stage)}|${layoutKey({ value, layout })}`;
    if (reduced.has(key)) continue; // what owes the same is added up before it is reduced
    reduced.add(key);
    bring(
      value,
      wholeOf(value),
      stage,
      true,
      (fs) => ({ op: name, because: "each rank saw other tokens", path: pathOf(fs, false) }),
      deferred,
    );
  }
  return { steps, deferred, update, accumulated, placement };
}

const keyOfAxis: Readonly<Record<string, string>> = {
  tp: "parallel.tensor",
  cp: "parallel.context",
  dp: "parallel.data",
  etp: "parallel.expert_tensor",
  ep: "parallel.expert",
  edp: "parallel.data",
};
