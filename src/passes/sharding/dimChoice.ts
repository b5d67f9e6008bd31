/** Choice of the dim of one op that each sub-axis shards: the rules of shard.ts. */
import { type DimSpec, expand, invariant, type Node, type Operand, type Pin, type Value } from "../../ops/op.ts";
import { sharersOf } from "../../ops/signature.ts";
import { idOf } from "../backward.ts";
import { PARTIAL_MAX, PARTIAL_SUM, pairs, REPLICATED, shardingOf } from "../layout.ts";
import { crossesNodes, subAxesOf } from "../mesh.ts";
import type { Placements } from "./placements.ts";

/** The dim of an op that a sub-axis shards, or that the output stays partial. Neither: the sub-axis shards no dim. */
export interface Choice {
  readonly dim?: string | undefined;
  readonly partial?: true;
  /** The index of the input that stays partial; all inputs if absent. */
  readonly of?: number;
  /** Returns the reason, as the plan states it, for a node of this form: it names its values. */
  readonly by: (uses: NodeUses) => string;
}
/** The choice for sub-axis `f`. */
export type SubAxisChoice = Choice & { readonly f: number };
/** Chooses among the votes of operands in place of rules 4 to 6; tests try random choices with it. */
export type Pick = (votes: readonly Choice[]) => Choice | undefined;

/** A value, and the operand of an op that it is used as. */
export interface OperandUse {
  readonly operand: Operand;
  readonly value: Value;
}
/** A node with its values and operands in pairs. */
export interface NodeUses {
  readonly node: Node;
  readonly ins: readonly OperandUse[];
  readonly outs: readonly OperandUse[];
}
/** Returns the values of a node beside their operands, with `...` expanded. */
export function usesOf(node: Node): NodeUses {
  const { inputs, outputs } = expand(node);
  const uses = (operands: readonly Operand[], values: readonly Value[]): OperandUse[] =>
    pairs(operands, values).map(([operand, value]) => ({ operand, value }));
  return { node, ins: uses(inputs, node.args), outs: uses(outputs, node.outs) };
}

/** Gradients that are partial over ranks with copies of the same elements, and those sub-axes. They may stay partial until they reach a parameter. */
export type CopySums = ReadonlyMap<Value, readonly number[]>;

/** Returns the choice for each sub-axis by the rules of shard.ts. */
export function chooseDims(uses: NodeUses, placements: Placements, copySums: CopySums, pick?: Pick): SubAxisChoice[] {
  const state = updatedBy(uses);
  return placements.every.map((f) => ({ f, ...choose(uses, f, state, placements, copySums, pick) }));
}

/** State that an op updates in place, and the operand that it is. */
interface Updated {
  readonly leaf: Value;
  readonly operand: Operand;
}
/** Returns the first state that a node updates. */
function updatedBy({ outs }: NodeUses): Updated | undefined {
  for (const { value, operand } of outs) if (value.updates) return { leaf: value.updates, operand };
  return undefined;
}

function choose(
  { node, ins, outs }: NodeUses,
  f: number,
  state: Updated | undefined,
  placements: Placements,
  copySums: CopySums,
  pick?: Pick,
): Choice {
  if (state) {
    const dim = state.operand.dimSpecs[shardingOf(placements.of(state.leaf).layout, f)]?.dim;
    return { dim, by: (uses) => `${updatedId(uses)} is ${dim ? alongText(dim) : "replicated"}` };
  }
  const of = ins.findIndex(({ value, operand }) => copySums.get(value)?.includes(f) && node.op.linearIn === operand.name);
  if (of >= 0) return { partial: true, of, by: () => "the copies are partial sums" };
  const at = ins.map(({ value }) => shardingOf(placements.of(value).layout, f));
  const linearAt = ins.findIndex(({ operand }) => operand.name === node.op.linearIn);
  if (at[linearAt] === PARTIAL_SUM && at.every((p, index) => index === linearAt || p === REPLICATED))
    return { partial: true, of: linearAt, by: () => "the op is linear in its partial input, and the ranks have the others" };
  const pin = pinOf(node, f, placements.mesh);
  if (pin)
    return {
      dim: pin.dim,
      by: (uses) => `the model pins ${pin.dim ?? "no dim"} at ${pin.axis} (${pinOf(uses.node, f, placements.mesh)?.path})`,
    };
  const local = localRowsOf(node, ins);
  const rows = ins[local]?.operand.dimSpecs.slice(0, ins[local].operand.ragged) ?? [];
  const held = rows[at[local] ?? REPLICATED];
  if (held) return { dim: held.dim, by: () => `${ins[local]?.operand.name} has rows of this rank alone` };
  if (node.op.linear && at.every((p) => p === PARTIAL_SUM)) return { partial: true, by: () => "all inputs are partial sums" };
  const votes = pairs(ins, at).flatMap(([{ value, operand }, dimIndex], index) => {
    const spec = operand.dimSpecs[dimIndex];
    // rows that are numbered on one rank keep their sharding
    if (!spec || spec.replicated || rows.some(({ dim }) => dim === spec.dim)) return [];
    const parameter = value.leaf?.kind === "parameter";
    const by = (uses: NodeUses): string => `${parameter ? operandId(uses, index) : operand.name} is ${alongText(spec.dim)}`;
    return [{ parameter, dim: spec.dim, by }];
  });
  const picked = pick?.(votes);
  if (picked) return picked;
  const weight = votes.find((x) => x.parameter);
  if (weight) return weight;
  const [first] = votes;
  if (!first) {
    if (at.some((p) => p === PARTIAL_SUM || p === PARTIAL_MAX))
      return { by: () => "the value is partial, and the op needs the reduced value" };
    const gathered = pairs(ins, at).flatMap(([{ operand }, dimIndex]) => operand.dimSpecs[dimIndex]?.dim ?? []);
    return { by: () => (gathered.length ? `${gathered[0]} is read completely` : "no operand is sharded") };
  }
  if (votes.every((x) => x.dim === first.dim)) return first;
  return votes.find((x) => outs[0]?.operand.dimSpecs.some((s) => s.dim === x.dim)) ?? first;
}

/** Returns the pin of a sub-axis, if the model declares one. */
const pinOf = ({ pins }: Node, f: number, mesh: Placements["mesh"]): Pin | undefined =>
  pins?.find(({ axis, across }) => subAxesOf(mesh, axis).includes(f) && (across === undefined || crossesNodes(mesh, f)));

/** Returns the index of the operand that says which rows of this rank a node has; -1 if its rows belong to no rank. */
function localRowsOf({ op }: Node, ins: readonly OperandUse[]): number {
  const isLocal = ({ value }: OperandUse): boolean => value.local === true;
  const named = ins.findIndex((use) => isLocal(use) && use.operand.name === op.rowsLike);
  const first = named >= 0 ? named : ins.findIndex(isLocal);
  return first < 0 && op.localRows ? ins.findIndex(({ value }) => value.ragged > 0) : first;
}

const alongText = (dim: string): string => `sharded along ${dim.replace("#", "dim ")}`;

/** Returns the id of an operand of a node. */
function operandId({ node, ins }: NodeUses, index: number): string {
  const use = ins[index];
  invariant(use !== undefined, () => `${node.id} has no operand ${index}`);
  return idOf(use.value);
}
/** Returns the id of the state that a node updates. */
function updatedId(uses: NodeUses): string {
  const state = updatedBy(uses);
  invariant(state !== undefined, () => `${uses.node.id} updates no state`);
  return idOf(state.leaf);
}

/**
 * Returns the sub-axes of each dim, outermost first: in the order of state or of a parameter, else of the operand with the most; then by stride. A
 * dim that the model pins to axes has the order of strides.
 */
export function orderSubAxes(
  { node, ins, outs }: NodeUses,
  chosen: readonly SubAxisChoice[],
  placements: Placements,
): Map<string, readonly number[]> {
  const dims = new Map<string, readonly number[]>();
  const byDim = new Map<string, number[]>();
  for (const { dim, f } of chosen) {
    if (dim === undefined) continue;
    const own = byDim.get(dim);
    if (own) own.unshift(f);
    else byDim.set(dim, [f]);
  }
  for (const [dim, own] of byDim) {
    // most dims have one sub-axis, which has no order
    if (own.length < 2 || node.pins?.some((pin) => pin.dim === dim && pin.across === undefined)) {
      dims.set(dim, own);
      continue;
    }
    const ordered = [...stateOf(outs), ...ins]
      .flatMap(({ value, operand }) => {
        const fs = placements.of(value).layout.shardedBy[operand.dimSpecs.findIndex((s) => s.dim === dim)];
        return fs ? [{ fixed: isFixed(value), fs }] : [];
      })
      .sort((a, b) => Number(b.fixed) - Number(a.fixed) || b.fs.length - a.fs.length)
      .flatMap((x) => x.fs);
    dims.set(dim, [...new Set([...ordered.filter((f) => own.includes(f)), ...own])]);
  }
  return dims;
}

const isFixed = ({ leaf }: Value): boolean => leaf?.kind === "parameter" || leaf?.kind === "state";

/** Returns the state that a node updates, beside the operands that it is. */
const stateOf = (outs: NodeUses["outs"]): OperandUse[] =>
  outs.flatMap(({ value, operand }) => (value.updates ? [{ value: value.updates, operand }] : []));

/** Returns the sub-axes of a dim that separate its elements, without those whose neighbouring ranks share one element. */
export function separating(s: DimSpec, size: Node["size"], fs: readonly number[], placements: Placements): readonly number[] {
  if (s.shared === undefined) return fs;
  const elements = (size[s.dim] ?? 1) / sharersOf(s, size);
  return fs.filter((_, i) => elements % placements.count(fs.slice(0, i + 1)) === 0);
}

/** Throws an invariant if a dim does not divide by its sub-axes. */
export function requireDivisible({ id, size }: Node, dims: ReadonlyMap<string, readonly number[]>, placements: Placements): void {
  for (const [dim, fs] of dims)
    invariant(
      (size[dim] ?? 0) % placements.count(fs) === 0,
      () => `${id}: ${dim} of ${size[dim]} elements does not divide by ${placements.count(fs)}`,
    );
}
