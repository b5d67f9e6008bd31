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

import { areDigits, parts as partsOf } from "../../schemas/sharding.ts";
import { expand, invariant, type Node, type Slot, sharersOf, type Value } from "../ops/op.ts";
import { type Graph, idOf } from "./backward.ts";
import { type Change, continues, howOf, type Layout, layoutKey, MAX, type Piece, placeOf, SUM, sequence, WHOLE } from "./layout.ts";
import { axesName, denseAxes, expertAxes, type Mesh } from "./mesh.ts";

interface Reason {
  readonly op: string;
  readonly because: string;
  readonly path: string;
}
export type Step =
  | {
      kind: "compute";
      stage: number;
      node: Node;
      ins: readonly Piece[];
      outs: readonly Piece[];
      dims: ReadonlyMap<string, readonly number[]>;
    }
  | {
      kind: "move";
      stage: number;
      how: Change;
      factors: readonly number[];
      from: Piece;
      to: Piece;
      radix: Layout["cuts"];
      backward: boolean;
      why: Reason;
    }
  /** From a virtual stage to the one beside it; `received` is the copy there. */
  | { kind: "send"; stage: number; to: number; piece: Piece; received: Piece; backward: boolean; why: Reason }
  /** A part of a parameter's gradient is complete for this microbatch, and is added up. */
  | { kind: "accumulate"; stage: number; parameter: Value; piece: Piece };
export interface Sharded {
  readonly steps: readonly Step[];
  /** After all microbatches: what each parameter's gradient, and each loss, still owes. */
  readonly deferred: readonly Step[];
  /** How each parameter's reduced gradient and optimizer state lie: as the parameter, or scattered. */
  readonly update: ReadonlyMap<Value, Piece>;
  /** How each parameter's accumulated gradient lies before it is reduced. */
  readonly accumulated: ReadonlyMap<Value, Piece>;
  readonly home: ReadonlyMap<Value, { readonly layout: Layout; readonly stage: number }>;
}
export interface Choice {
  readonly dim?: string | undefined;
  readonly owed?: true;
  /** The one input whose sum stays owed; all of them if absent. */
  readonly of?: number;
  readonly by: string;
}
export interface Options {
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
type Made = Map<string, { piece: Piece; backward: boolean }>;

export function shard(graph: Graph, mesh: Mesh, { distributedOptimizer, shares, stageOf, roleOf, pick }: Options): Sharded {
  const every = mesh.factors.map((_, f) => f);
  const parts = (fs: readonly number[]) => partsOf(mesh, fs);
  const home = new Map<Value, { layout: Layout; stage: number }>();
  const steps: Step[] = [];
  /** Pieces that exist, per value. */
  const made = new Map<Value, Made>();

  const wholeOf = (v: Value): Layout => ({ cuts: v.sizes.map(() => []), sum: [], max: [] });
  const cutsBy = (cut: NonNullable<Value["cut"]>): Layout["cuts"] => cut.map((axes) => axes.flatMap((a) => mesh.axes[a]!.toReversed()));
  const declared = (v: Value): Layout => ({ ...wholeOf(v), cuts: cutsBy(v.cut!) });
  /** A value lies by one grid at a time: the factors of another that does not nest with it mean nothing beside its own. */
  const inOneGrid = (v: Value, ...layouts: readonly Layout[]) => {
    const fs = [...new Set(layouts.flatMap((l) => [...l.cuts.flat(), ...l.sum, ...l.max]))];
    invariant(areDigits(mesh, fs), `${idOf(v)} would be cut by ${axesName(mesh, fs, false)}, of grids that do not nest`);
  };
  const settle = (v: Value, layout: Layout, stage: number) => {
    inOneGrid(v, layout);
    for (const [slot, fs] of layout.cuts.entries())
      invariant(v.sizes[slot]! % parts(fs) === 0, `${idOf(v)}: slot ${slot} of ${v.sizes[slot]} over ${parts(fs)}`);
    home.set(v, { layout, stage });
  };
  for (const v of graph.order.flatMap((n) => n.args)) if (v.leaf && !home.has(v)) settle(v, declared(v), stageOf(v.leaf.position));

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
    if (of >= 0) return { owed: true, of, by: "copies owe a sum" };
    if (node.pin && mesh.axes[node.pin.axis]!.includes(f))
      return { dim: node.pin.dim, by: `the model pins ${node.pin.dim ?? "no dim"} at ${node.pin.axis} (${node.pin.path})` };
    const at = node.args.map((v) => placeOf(home.get(v)!.layout, f));
    if (node.op.linear && at.every((p) => p === SUM)) return { owed: true, by: "all inputs owe a sum" };
    const votes = node.args.flatMap((v, i) => {
      const slot = inputs[i]!.slots[at[i]!];
      if (!slot || slot.whole) return [];
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
      return votes[0] ?? { by: at.includes(SUM) || at.includes(MAX) ? "a part is owed, and it needs the whole" : "nothing cuts it" };
    return votes.find((x) => outputs[0]!.slots.some((s) => s.dim === x.dim)) ?? votes[0]!;
  }

  /** The factors of each dim, outermost first: as the operand that is cut most along it has them (a parameter first), then larger strides. */
  function nest(node: Node, chosen: readonly Choice[], { inputs }: Operands): Map<string, number[]> {
    const dims = new Map<string, number[]>();
    for (const dim of new Set(chosen.flatMap((c) => c.dim ?? []))) {
      const mine = every.filter((f) => chosen[f]!.dim === dim).reverse();
      const seen = node.args
        .flatMap((v, i) => {
          const slot = inputs[i]!.slots.findIndex((s) => s.dim === dim);
          return slot < 0 ? [] : [{ weight: v.leaf?.kind === "parameter", fs: home.get(v)!.layout.cuts[slot]! }];
        })
        .sort((a, b) => Number(b.weight) - Number(a.weight) || b.fs.length - a.fs.length)
        .flatMap((x) => x.fs);
      dims.set(dim, [...new Set([...seen.filter((f) => mine.includes(f)), ...mine])]);
    }
    return dims;
  }

  /** Of the factors that cut a dim, those that cut a slot of it: not those between neighbours that share an element. */
  const apart = (s: Slot, size: Node["size"], fs: readonly number[]): readonly number[] => {
    const elements = size[s.dim]! / sharersOf(s, size);
    return s.shared === undefined ? fs : fs.filter((_, i) => elements % parts(fs.slice(0, i + 1)) === 0);
  };

  /** The factors of each dim around a fold. Both grids tell all ranks of a stage apart, and a rank has as much of each dim in both. */
  function foldOf(node: Node, { inputs, outputs }: Operands): Map<string, readonly number[]> | undefined {
    if (!node.fold) return undefined;
    const [from, to] = [cutsBy(node.fold.from), cutsBy(node.fold.to)];
    for (const cuts of [from, to])
      invariant(areDigits(mesh, cuts.flat()) && parts(cuts.flat()) === mesh.per_stage, `${node.id}: two ranks would have the same tokens`);
    for (const [slot, n] of node.args[0]!.sizes.entries())
      invariant(
        n / parts(from[slot]!) === node.outs[0]!.sizes[slot]! / parts(to[slot]!),
        `${node.id}: a rank has other sizes in slot ${slot}`,
      );
    const dims = (slots: readonly Slot[], cuts: Layout["cuts"]) => slots.map((s, i) => [s.dim, cuts[i]!] as const);
    return new Map([...dims(inputs[0]!.slots, from), ...dims(outputs[0]!.slots, to)]);
  }

  /** What tells the pieces of a value at a virtual stage apart from those at an earlier one of the same ranks: they live in other chunks. */
  const copies = new Map<Value, Map<number, number>>();
  const copyNote = (v: Value, stage: number): string => {
    const holders = copies.get(v) ?? new Map([[roleOf(home.get(v)!.stage), home.get(v)!.stage]]);
    copies.set(v, holders);
    const holder = holders.get(roleOf(stage)) ?? stage;
    holders.set(roleOf(stage), holder);
    return holder === stage ? "" : `.v${stage}`;
  };

  /** Sends a value from the virtual stage that has it to another, by way of those between: a stage receives from its neighbours alone. */
  function deliver(v: Value, stage: number, known: Made, backward: boolean, why: Reason, into: Step[]): Piece {
    const at = home.get(v)!;
    let piece: Piece = { value: v, layout: at.layout };
    // an input is there on every stage, a parameter in all chunks of its ranks
    if (v.leaf?.kind === "input" || (v.leaf && roleOf(at.stage) === roleOf(stage))) return piece;
    const way = Math.sign(stage - at.stage);
    for (let from = at.stage; from !== stage; from += way) {
      const to = from + way;
      const note = copyNote(v, to);
      const received: Piece = { value: v, layout: at.layout, ...(note ? { note } : {}) };
      const key = `${to}|${layoutKey(received)}`;
      if (!known.has(key)) {
        into.push({ kind: "send", stage: from, to, piece, received, backward, why });
        known.set(key, { piece: received, backward });
      }
      piece = received;
    }
    return piece;
  }

  /** Makes a value available at a stage in a layout: sent if need be, then moved; each piece once (all-gathers once per direction). */
  function bring(
    v: Value,
    want: Layout,
    stage: number,
    backward: boolean,
    why: (changed: readonly number[]) => Reason,
    into: Step[],
  ): Piece {
    const at = home.get(v)!;
    const known: Made = made.get(v) ?? new Map();
    made.set(v, known);
    const because = { because: "the next layer is on another stage", path: "parallel.pipeline" };
    const start = deliver(v, stage, known, backward, { ...why([]), ...because }, into);
    const copy = copyNote(v, stage);
    const crossed = at.layout.cuts.map((fs, slot) => !continues(fs, want.cuts[slot]!) && !continues(want.cuts[slot]!, fs));
    if (!crossed.some(Boolean)) return go(start, want);
    // a factor would cross another that stays: by way of whole
    return go(go(start, { ...at.layout, cuts: at.layout.cuts.map((fs, slot) => (crossed[slot] ? [] : fs)) }), want);

    function go(first: Piece, target: Layout): Piece {
      inOneGrid(v, first.layout, target);
      let piece = first;
      const radix = first.layout.cuts.map((fs, slot) => (fs.length > target.cuts[slot]!.length ? fs : target.cuts[slot]!));
      for (const how of sequence) {
        const factors = every.filter((f) => howOf(placeOf(first.layout, f), placeOf(target, f)) === how);
        if (!factors.length) continue;
        const now = (f: number) => placeOf(factors.includes(f) ? target : piece.layout, f);
        const layout: Layout = {
          cuts: radix.map((fs, slot) => fs.filter((f) => now(f) === slot)),
          sum: every.filter((f) => now(f) === SUM),
          max: every.filter((f) => now(f) === MAX),
        };
        // counted in blocks of factors that do not cut it: no layout of its own
        const halfway = layout.cuts.every((fs, slot) => continues(fs, radix[slot]!)) ? "" : `~${radix.map((c) => c.join(".")).join(",")}`;
        const source = piece.note?.includes("again") ? ".again" : "";
        const note = copy + halfway + source;
        const to: Piece = { value: v, layout, ...(note ? { note } : {}) };
        const key = `${stage}|${layoutKey(to)}`;
        const before = known.get(key);
        if (before && (how !== "all_gather" || before.backward === backward)) {
          piece = before.piece;
          continue;
        }
        const fresh: Piece = before ? { ...to, note: `${note}.again` } : to;
        into.push({ kind: "move", stage, how, factors, from: piece, to: fresh, radix, backward, why: why(factors) });
        known.set(key, { piece: fresh, backward });
        piece = fresh;
      }
      return piece;
    }
  }

  const accumulated = new Map<Value, Piece>();
  for (const node of graph.order) {
    const stage = stageOf(node.position);
    const operands = expand(node);
    const { inputs, outputs } = operands;
    const { size } = node;
    const fold = foldOf(node, operands);
    const chosen = every.map((f) => (fold ? { by: "each rank keeps its tokens" } : choose(node, f, operands)));
    const dims = fold ?? nest(node, chosen, operands);
    for (const [dim, fs] of dims) invariant(size[dim]! % parts(fs) === 0, `${node.id}: ${dim} of ${size[dim]} over ${parts(fs)}`);
    const owed = every.filter((f) => chosen[f]!.owed);
    const cutOf = (s: Slot): readonly number[] =>
      apart(s, size, dims.get(node.around?.dim === s.dim ? node.around.as : s.whole && !fold ? "" : s.dim) ?? []);
    const ins = node.args.map((v, i) => {
      const sum = owed.filter((f) => (chosen[f]!.of ?? i) === i);
      const want: Layout = { cuts: inputs[i]!.slots.map(cutOf), sum, max: [] };
      const why = (fs: readonly number[]): Reason => ({
        op: `${node.id}.${inputs[i]!.name}`,
        because: [
          ...new Set(
            fs.map((f) =>
              chosen[f]!.dim && inputs[i]!.slots.some((s) => s.dim === chosen[f]!.dim && s.whole)
                ? `${chosen[f]!.dim} is read whole`
                : chosen[f]!.by,
            ),
          ),
        ].join("; "),
        path: pathOf(fs, v.ragged > 0),
      });
      return bring(v, want, stage, node.backward, why, steps);
    });
    const outs = node.outs.map((value, i): Piece => {
      const cuts = outputs[i]!.slots.map((s) => (node.around?.dim === s.dim ? cutOf(s) : apart(s, size, dims.get(s.dim) ?? [])));
      const gone = every.filter((f) => chosen[f]!.dim && !cuts.some((fs) => fs.includes(f)));
      const layout: Layout =
        node.op.owes === "max" ? { cuts, sum: owed, max: gone } : { cuts, sum: [...owed, ...gone].sort((a, b) => a - b), max: [] };
      settle(value, layout, stage);
      const between = (f: number) => outputs[i]!.slots.some((s) => s.shared !== undefined && s.dim === chosen[f]!.dim);
      const copied = layout.sum.filter((f) => chosen[f]!.of !== undefined || between(f));
      if (copied.length) copiesOf.set(value, copied);
      return { value, layout };
    });
    if (fold) {
      const why = { op: node.id, because: "the grids of tokens and experts do not nest, and each rank keeps its tokens", path: "parallel" };
      steps.push({ kind: "move", stage, how: "fold", factors: [], from: ins[0]!, to: outs[0]!, radix: [], backward: node.backward, why });
    } else steps.push({ kind: "compute", stage, node, ins, outs, dims });
    for (const v of node.outs) {
      const rehome = (layout: Layout, because: string) =>
        settle(
          v,
          bring(v, layout, stage, node.backward, (fs) => ({ op: node.id, because, path: pathOf(fs, v.ragged > 0) }), steps).layout,
          stage,
        );
      if (v.cut) rehome(declared(v), "the model lays it so");
      const of = graph.gradOf.get(v);
      if (!of) continue;
      const { layout } = home.get(of)!;
      const parameter = of.leaf?.kind === "parameter";
      if (!parameter && graph.grad.get(of) !== v) continue;
      const still = every.filter((f) => {
        const mayOwe = parameter || copiesOf.get(v)?.includes(f) ? [WHOLE] : [SUM, MAX];
        return placeOf(home.get(v)!.layout, f) === SUM && mayOwe.includes(placeOf(layout, f));
      });
      rehome({ ...layout, sum: still, max: [] }, `the gradient of ${idOf(of)} lies as it does`);
      if (!parameter) continue;
      const piece: Piece = { value: v, layout: home.get(v)!.layout };
      steps.push({ kind: "accumulate", stage, parameter: of, piece });
      const first = accumulated.get(of);
      invariant(!first || layoutKey(first) === layoutKey(piece), `${idOf(of)}: its uses owe different sums`);
      if (!first) accumulated.set(of, piece);
    }
  }

  const deferred: Step[] = [];
  const update = new Map<Value, Piece>();
  for (const p of graph.parameters) {
    const piece = accumulated.get(p)!;
    const { layout } = home.get(p)!;
    // a parameter that several chunks use has its gradient where the last of them adds to it
    const { stage } = home.get(piece.value)!;
    const owed = piece.layout.sum.toReversed();
    // the owed factors join a dim they divide: a reduce-scatter; where none fits, an all-reduce
    const shared = owed.filter(shares);
    // what goes by a count of its own rule needs all of it
    const joins = distributedOptimizer && !p.leaf!.rule;
    const slot = joins ? p.sizes.findIndex((n, i) => n % parts([...layout.cuts[i]!, ...shared]) === 0) : -1;
    const target: Layout = { ...layout, cuts: layout.cuts.map((fs, i) => (i === slot ? [...fs, ...shared] : fs)) };
    const expert =
      owed.length > 0 &&
      mesh.axes.edp!.join() === piece.layout.sum.join() &&
      layout.cuts.flat().some((f) => mesh.axes.ep!.includes(f) || mesh.axes.etp!.includes(f));
    const why = (fs: readonly number[]): Reason => ({
      op: `gradient of ${idOf(p)}`,
      because: "each rank saw other tokens",
      path: pathOf(fs, expert),
    });
    update.set(p, bring(piece.value, target, stage, true, why, deferred));
  }
  const reduced = new Set<string>();
  for (const { name, value } of graph.losses) {
    const { layout, stage } = home.get(value)!;
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
  return { steps, deferred, update, accumulated, home };
}

const keyOfAxis: Readonly<Record<string, string>> = {
  tp: "parallel.tensor",
  cp: "parallel.context",
  dp: "parallel.data",
  etp: "parallel.expert_tensor",
  ep: "parallel.expert",
  edp: "parallel.data",
};
