/**
 * An op is one declaration. Its signature gives the argument names, the shape rule, the bytes touched and the sharding rule of each
 * output: a dim of the output may be sharded; sharding a dim that only inputs have makes the output partial.
 *
 *   D!      replicated: must not be sharded
 *   G*M*C   one dim in memory; only the leading factor may be sharded, the others are attributes
 *   G/N*C   N neighbours of G share an element: sub-axes that shard G more finely leave it replicated; N is an attribute, default 1
 *   B~S~E   one ragged dim: the rows (b,s,e) that exist, sorted by e, then b, then s; each of B, S, E may be sharded
 *   ...     any dims, equal in all operands with `...`
 */

import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import type { HostInput } from "../../schemas/plan.ts";
import { type DimAxes, limitsOf, type Pin, type Quota, type Regrid, type Sharing } from "./declarations.ts";
import { type Expr, layoutOf, operandsOf, type Result } from "./formula.ts";
import { type CpuFormula, cpuFormula } from "./formulaCpu.ts";
import { invariant } from "./invariant.ts";
import { dimSize, type Operand, operandsOfSide, sharersOf } from "./signature.ts";

export type { Pin, Quota, Regrid, Sharing } from "./declarations.ts";
export { BrokenInvariant, invariant } from "./invariant.ts";
export type { DimSpec, Operand } from "./signature.ts";

type Words<S extends string> = S extends `${infer A} ${infer B}` ? A | Words<B> : S;
type Side<S extends string, At extends "in" | "out"> = S extends `${infer I} -> ${infer O}` ? Words<At extends "in" ? I : O> : never;
type Split<S extends string, By extends string> = S extends `${infer A}${By}${infer B}` ? A | Split<B, By> : S;
type Bare<D extends string> = D extends `${infer N}!` ? N : D;
type Unshared<D extends string> = D extends `${infer N}/${string}` ? N : D;
type DimsOf<W extends string> = W extends `${string}[${infer D}]` ? Unshared<Bare<Split<Split<Split<D, ",">, "~">, "*">>> : never;
type NameOf<W extends string> = W extends `${infer N}[${string}]` ? N : never;
type In<S extends string> = NameOf<Side<S, "in">>;
type Out<S extends string> = NameOf<Side<S, "out">>;
type Dim<S extends string> = DimsOf<Side<S, "in" | "out">>;
type Each<K extends string, T> = Readonly<Record<K, T>>;

/** Attributes of a node by name. */
export type Attrs = Readonly<Record<string, number>>;
/** Gradients of outputs by name. */
export type Grads = Readonly<Record<string, Value>>;

/** The first output `y`, its gradient `dy`, and in `dys` the gradients of all `gradOutputs`. */
export interface OutputGrads {
  readonly y: Value;
  readonly dy: Value;
  readonly dys: readonly Value[];
}

/** Global coordinates of the shard that an op computes. An op never divides by a local size: constants of the job are attributes. */
export interface ShardContext {
  /** Returns the global index of the first local element of a dim; shards are contiguous. */
  start(dim: string): number;
  /** The rows of the ragged operands: [count, b0, s0, e0, b1, …] in global coordinates. */
  readonly rows: Int32Array;
  /** The first element of this rank's block of the input, of ops that read one block; 0 if absent. */
  readonly block?: number;
}

/** The name of an op that a graph may use. `shard` replaces each `regrid` by a reshard step, so no instruction has that name. */
export type GraphOpName = OpName | "regrid";

/** Sizes that the reference and kernels of an op receive: dims and required attributes by name, and optional attributes. */
type OpSizes<S extends string, A extends string> = Each<Dim<S> | A, number> & Attrs;

/** What all declarations of an op have. */
interface BaseDeclaration<S extends string, N extends GraphOpName, A extends string, R extends string> {
  /** The name in plans. `npm run schemas` adds a new one to schemas/opNames.ts. */
  readonly name: N;
  readonly sig: S;
  /** The pending reduction of a partial output; default: sum. `merge` is attention_merge of the partial outputs; values of a graph cannot be partial by it. */
  readonly reduction?: "max" | "merge";
  /** f(a+a', b+b') = f(a,b) + f(a',b'): if all inputs are partial sums, the output may stay partial. */
  readonly linear?: true;
  /** f is linear in this input alone: if it is a partial sum over copies of the same rows, all outputs may stay partial. */
  readonly linearIn?: In<S>;
  /** The operand whose rows the ragged outputs have; default: the first ragged one. */
  readonly rowsLike?: In<S>;
  /** The ragged outputs are `local` (see Value). */
  readonly localRows?: true;
  /** Types of outputs; default: the type of the first float input. */
  readonly types?: Partial<Each<Out<S>, Dtype>>;
  /** Outputs that receive a gradient, in the order of `dys`; default: the first output. */
  readonly gradOutputs?: readonly Out<S>[];
  /** Last part of the id of a backward node; default: `grad`. */
  readonly suffix?: string;
  /** Outputs that `cpu` reads and updates in place. All other outputs are zero before `cpu` runs. */
  readonly inPlace?: readonly Out<S>[];
  /** Per updated output, the attribute that holds its maximum in a step. A run in which the output exceeds it ends with an error. */
  readonly limits?: Partial<Each<Out<S>, string>>;
  /** Attributes that every use has, beyond the inner factors in the signature; others are optional. */
  readonly attrs?: readonly A[];
  /** Attributes that a kernel receives at launch as 32 bits: uses that differ only in these share one kernel. */
  readonly runtimeAttrs?: readonly R[];
  /** Returns the number of floating-point operations at local or global sizes; R is the number of rows. */
  flops?(d: OpSizes<S, A | R | "R">): number;
  /** For ops that make a ragged value from dense ones: writes at most `bound` rows as [count, b, s, e, …] (global) into `rows`; returns the count needed. */
  rows?(t: Each<In<S>, Float32Array>, d: OpSizes<S, A | R>, p: ShardContext, rows: Int32Array, bound: number): number;
  /** Returns the gradient of each differentiable input as ops. Inputs left out have no gradient. */
  grad?(t: Each<In<S>, Value>, g: OutputGrads, a: Attrs): Grads;
}

/** An op with hand-written arithmetic. */
export interface Declaration<S extends string, N extends GraphOpName, A extends string = never, R extends string = never>
  extends BaseDeclaration<S, N, A, R> {
  /** The reference arithmetic: plain loops over local shards. bf16 values are passed as f32 and rounded when stored. */
  cpu(t: Each<In<S> | Out<S>, Float32Array>, d: OpSizes<S, A | R>, p: ShardContext): void;
}
/** An elementwise or per-row op. */
export interface FormulaDeclaration<S extends string, N extends OpName, A extends string = never> extends BaseDeclaration<S, N, A, never> {
  /** Returns the result of each output as an expression (formula.ts). */
  formula(t: Each<In<S> | Out<S>, Expr>, d: OpSizes<S, A>): Each<Out<S>, Result>;
}

/** An op with its operand names as plain strings: the form that passes and the runtime use. By default an op of the table (index.ts). */
export interface AnyOp<N extends GraphOpName = OpName>
  extends Omit<
    BaseDeclaration<string, N, string, string>,
    "rows" | "grad" | "flops" | "types" | "inPlace" | "limits" | "gradOutputs" | "linearIn" | "rowsLike"
  > {
  /** Adds a node of this op to the graph and returns its outputs by name. Throws a BrokenInvariant where shapes disagree. */
  all(args: Readonly<Record<string, Value>>, attrs?: Attrs, id?: string): Readonly<Record<string, Value>>;
  readonly inputs: readonly Operand[];
  readonly outputs: readonly Operand[];
  readonly linearIn?: string;
  readonly rowsLike?: string;
  readonly types?: Readonly<Record<string, Dtype>>;
  readonly inPlace?: readonly string[];
  readonly limits?: Readonly<Record<string, string>>;
  flops?(d: Readonly<Record<string, number>>): number;
  cpu(t: Readonly<Record<string, Float32Array>>, d: Readonly<Record<string, number>>, p: ShardContext): void;
  rows?(
    t: Readonly<Record<string, Float32Array>>,
    d: Readonly<Record<string, number>>,
    p: ShardContext,
    rows: Int32Array,
    bound: number,
  ): number;
  readonly gradOutputs?: readonly string[];
  grad?(t: Readonly<Record<string, Value>>, g: OutputGrads, a: Attrs): Grads;
}
/** An op whose operand names are checked at compile time. */
export interface Op<S extends string, N extends GraphOpName = GraphOpName, A extends string = never> extends AnyOp<N> {
  readonly sig: S;
  readonly attrs?: readonly A[];
  /** Adds a node of this op to the graph and returns its first output. */
  of(args: Each<In<S>, Value>, attrs?: Attrs, id?: string): Value;
  all(args: Each<In<S>, Value>, attrs?: Attrs, id?: string): Each<Out<S>, Value>;
}
/** An op with a formula, with operand names as plain strings. */
export interface AnyFormulaOp<N extends OpName = OpName> extends AnyOp<N> {
  formula(t: Readonly<Record<string, Expr>>, d: Readonly<Record<string, number>>): Readonly<Record<string, Result>>;
}
/** An op with a formula whose operand names are checked at compile time. */
export interface FormulaOp<S extends string, N extends OpName, A extends string = never>
  extends Op<S, N, A>,
    Pick<AnyFormulaOp<N>, "formula"> {}
/** The names of an op's operands, and of its dims and required attributes. */
export type OperandName<O> = O extends Op<infer S, infer _N, infer _A> ? In<S> | Out<S> : never;
/** The names of dims and attributes of an op. */
export type SizeName<O> = O extends Op<infer S, infer _N, infer A> ? Dim<S> | A : never;

/** A tensor of the graph with global sizes, one per dim. The ragged dims come first. `declared` returns a copy with other declarations. */
export interface Value {
  readonly node?: Node;
  readonly out: number;
  readonly sizes: readonly number[];
  readonly ragged: number;
  /** Largest number of rows per (b,s) of a ragged value: top_k of the router. */
  readonly fanout: number;
  /** Mean number of rows per (b,s) of a ragged value under balanced routing; absent: fanout. */
  readonly meanFanout?: number;
  /** Largest number of rows per expert of a ragged value. */
  readonly quota?: Quota;
  /** Of a ragged value: what its rows hold, or how they are numbered, belongs to the rank that made them. They cannot be exchanged. */
  readonly local?: boolean;
  readonly leaf?: Leaf;
  readonly dtype: Dtype;
  /** Of an output that its op updates in place: the leaf whose memory it is. */
  readonly updates?: Value;
  /** Per dim the mesh axes that must shard it; absent: `shard` decides. */
  readonly shardAxes?: DimAxes;
}
/** A value that no op of the graph produces. `gradient` and `state` are leaves of the optimizer step (src/passes/updateGraph.ts). */
export interface Leaf {
  readonly kind: "parameter" | "input" | "gradient" | "state";
  readonly name: string;
  readonly position: number;
  /** Of an input that the host fills: what it writes. */
  readonly source?: HostInput;
  /**
   * Of a parameter. `matrix`: a hidden weight [in, out], or one such matrix per expert; `vocabulary`: an embedding table or the output
   * head; `vector`: a gain, a bias, or a statistic.
   */
  readonly role?: "matrix" | "vocabulary" | "vector";
  readonly init?: { readonly type: "normal" | "ones" | "zeros"; readonly std: number };
  /** The update rule of a parameter without a gradient: an op on a statistic of the step. */
  readonly rule?: { readonly name: "expert_bias" | "quantile"; readonly op: AnyOp; readonly attrs: Attrs };
  /** For a tied copy, the parameter at another position with the same name. */
  readonly tiedTo?: Value;
}
/** A value that no op produces. */
export type LeafValue = Value & { readonly leaf: Leaf };
/** One use of an op in the graph. `changed` returns a copy with other declarations. */
export interface Node {
  readonly op: AnyOp<GraphOpName>;
  readonly args: readonly Value[];
  readonly attrs: Attrs;
  readonly outs: readonly Value[];
  /** Global size of each dim, and the attributes. */
  readonly size: Readonly<Record<string, number>>;
  readonly id: string;
  /** Position in the model, which decides the stage: 0 the embedding, from 1 the layers, last the head. */
  readonly position: number;
  /** The position whose name the id has, if it is another: a sum of gradients is named after the value and runs where the value is read. */
  readonly namedAt?: number | undefined;
  readonly backward: boolean;
  /** The dims that mesh axes must shard. */
  readonly pins?: readonly Pin[] | undefined;
  /** A replicated dim that need not be gathered: its shards, laid out like dim `as`, pass around a ring of ranks (ring.ts). */
  readonly ring?: { readonly dim: string; readonly as: string; readonly path: string } | undefined;
  /** Of a regrid node: the axes that shard its input and its output. */
  readonly regrid?: Regrid | undefined;
  /** How ranks share the elements of a dim that are fewer than the ranks. */
  readonly sharing?: Sharing | undefined;
}
type NodeDeclarations = Pick<Node, "pins" | "ring" | "regrid" | "sharing">;
type ValueDeclarations = Pick<Value, "shardAxes"> & Partial<Pick<Value, "dtype">>;

/** Returns a copy of a node that differs in `changes`. Its outputs are new values: copies of `outs`, which are its own by default. */
export function changed(
  node: Node,
  changes: NodeDeclarations & Partial<Pick<Node, "id" | "position" | "namedAt" | "backward" | "args" | "outs">>,
): Node {
  const outs: Value[] = [];
  const made: Node = { ...node, ...changes, outs };
  for (const out of changes.outs ?? node.outs) outs.push({ ...out, node: made });
  return made;
}
/** Returns a copy of the result of a node with other declarations about it or its node. Throws an invariant for a leaf. */
export function declared(value: Value, { pins, ring, regrid, sharing, ...own }: NodeDeclarations & ValueDeclarations): Value {
  const { node } = value;
  invariant(node !== undefined, () => `${value.leaf?.name} is the result of no node`);
  const outs = node.outs.map((out) => (out.out === value.out ? { ...out, ...own } : out));
  const given = { ...(pins && { pins }), ...(ring && { ring }), ...(regrid && { regrid }), ...(sharing && { sharing }) };
  return outputOf(changed(node, { ...given, outs }), value.out);
}
/** Returns an output of a node by its index. */
export function outputOf({ id, outs }: Node, index: number): Value {
  const output = outs[index];
  invariant(output !== undefined, () => `${id} has no output ${index}`);
  return output;
}

/** Makes an op from its declaration; the signature is parsed here and by the type checker. */
export function op<const S extends string, const N extends GraphOpName, const A extends string = never, const R extends string = never>(
  def: Declaration<S, N, A, R>,
): Op<S, N, NoInfer<A>> {
  return opOf<S, N, A>(def, (def as unknown as Pick<AnyOp, "cpu">).cpu);
}

/** Makes an op whose reference and kernels are derived from a formula. */
export function formulaOp<const S extends string, const N extends OpName, const A extends string = never>(
  def: FormulaDeclaration<S, N, A>,
): FormulaOp<S, N, NoInfer<A>> {
  const { formula } = def as unknown as Pick<FormulaOp<S, N, A>, "formula">;
  // a job uses few sizes of an op
  const prepared = new Map<string, CpuFormula>();
  const self = opOf<S, N, A>(def, (t, d, place) => {
    const key = Object.entries(d).join();
    let own = prepared.get(key);
    if (!own) prepared.set(key, (own = cpuFormula(layout, formula(operandsOf(layout), d), d)));
    const dim = layout.rowDims.at(-1);
    own(t, place.rows[0] ?? 0, dim === undefined ? 0 : place.start(dim));
  });
  const layout = layoutOf(self);
  // the nodes of the graph refer to this object, and passes compare ops by identity
  return Object.assign(self, { formula });
}

function opOf<const S extends string, const N extends GraphOpName, const A extends string>(
  def: BaseDeclaration<S, N, A, string>,
  cpu: AnyOp["cpu"],
): Op<S, N, A> {
  const [inputs = [], outputs = []] = def.sig.split(" -> ").map(operandsOfSide);
  const all = (named: Each<In<S>, Value>, attrs: Attrs = {}, id = "") => {
    for (const a of def.attrs ?? []) invariant(attrs[a] !== undefined, () => `${def.name} ${id} has no attribute ${a}`);
    const args = inputs.map((i) => named[i.name as In<S>]);
    const node = nodeOf(self, args, attrs, id);
    return Object.fromEntries(outputs.map((o, i) => [o.name, outputOf(node, i)])) as Each<Out<S>, Value>;
  };
  const self: Op<S, N, A> = {
    ...(def as unknown as AnyOp<N> & Pick<Op<S, N, A>, "sig" | "attrs">),
    cpu,
    inputs,
    outputs,
    all,
    of: (named, attrs, id) => all(named, attrs, id)[outputs[0]!.name as Out<S>],
  };
  return self;
}

/** Returns a use of an op, with its arguments in the order of the signature. Throws a BrokenInvariant where shapes disagree. */
export function nodeOf(op: Node["op"], args: readonly Value[], attrs: Attrs, id: string): Node {
  const position = Math.max(...args.map((v) => v.node?.position ?? v.leaf?.position ?? 0));
  const size = sizesOf({ op, args, attrs });
  const outs: Value[] = [];
  const node: Node = { op, args, attrs, outs, size, id, position, backward: false };
  const like = args.find((v) => dtypes[v.dtype].kind === "float")?.dtype ?? "f32";
  const source = rowSourceOf({ op, args });
  const rows = source ?? limitsOf(attrs);
  const local = op.localRows ?? (op.rowsLike === undefined && source?.local);
  for (const [out, o] of expand(node).outputs.entries())
    outs.push({
      node,
      out,
      ragged: o.ragged,
      fanout: o.ragged ? rows.fanout : 0,
      ...(o.ragged && rows.meanFanout !== undefined ? { meanFanout: rows.meanFanout } : {}),
      ...(o.ragged && rows.quota ? { quota: rows.quota } : {}),
      ...(o.ragged && local ? { local } : {}),
      sizes: o.dimSpecs.map((s) => dimSize(s, size)),
      dtype: op.types?.[o.name] ?? like,
    });
  return node;
}
/** Returns the same use of an op with other arguments and attributes. It keeps the declarations of the node and of its outputs. */
export function withArgs(node: Node, args: readonly Value[], attrs: Attrs = node.attrs): Node {
  if (attrs === node.attrs && args.every((v, i) => v === node.args[i])) return node;
  const made = nodeOf(node.op, args, attrs, node.id);
  const outs = made.outs.map((out) => {
    const { dtype, shardAxes, updates } = outputOf(node, out.out);
    return { ...out, dtype, ...(shardAxes && { shardAxes }), ...(updates && { updates }) };
  });
  const { position, namedAt, backward, pins, ring, regrid, sharing } = node;
  return changed(made, { position, namedAt, backward, pins, ring, regrid, sharing, outs });
}

/** Returns the operand whose rows the ragged results of an op have; undefined if the op makes rows. */
export function rowSourceOf({ op, args }: Pick<Node, "op" | "args">): Value | undefined {
  if (op.rows) return undefined;
  const named = op.rowsLike === undefined ? undefined : args[op.inputs.findIndex((i) => i.name === op.rowsLike)];
  return named ?? args.find((v) => v.ragged);
}
/** Returns the input whose rows an op computes on, if its results have the rows of another one; undefined for all other ops. */
export const rowsOperandOf = ({ rowsLike, inputs }: Pick<AnyOp, "rowsLike" | "inputs">): string | undefined =>
  rowsLike === undefined ? undefined : inputs.find((o) => o.ragged > 0)?.name;
/** Returns the operands of one use of an op, with `...` replaced by the dims of the argument. */
export function expand({ op: o, args }: Pick<Node, "op" | "args">): { inputs: readonly Operand[]; outputs: readonly Operand[] } {
  const like = args[o.inputs.findIndex((i) => i.any)];
  return expandLike(o, like ? { dimSpecs: like.sizes.length, ragged: like.ragged } : undefined);
}
/** Returns the operands of an op, with `...` replaced by `like.dimSpecs` dims of which `like.ragged` are ragged. */
export function expandLike(
  o: AnyOp<GraphOpName>,
  like: { dimSpecs: number; ragged: number } | undefined,
): Pick<AnyOp, "inputs" | "outputs"> {
  if (!like) return o;
  const key = like.dimSpecs * 64 + like.ragged;
  const known = expansions.get(o) ?? new Map<number, Pick<AnyOp, "inputs" | "outputs">>();
  expansions.set(o, known);
  const found = known.get(key) ?? expandNow(o, like);
  known.set(key, found);
  return found;
}
/** Expanded operands: a compile asks for those of a few ops thousands of times. */
const expansions = new WeakMap<AnyOp<GraphOpName>, Map<number, Pick<AnyOp, "inputs" | "outputs">>>();

function expandNow(o: AnyOp<GraphOpName>, like: { dimSpecs: number; ragged: number }): Pick<AnyOp, "inputs" | "outputs"> {
  const fill = (t: Operand): Operand =>
    t.any
      ? {
          ...t,
          ragged: like.ragged,
          dimSpecs: Array.from({ length: like.dimSpecs }, (_, i) => ({ dim: `#${i}`, inner: [], replicated: false })),
        }
      : t;
  return { inputs: o.inputs.map(fill), outputs: o.outputs.map(fill) };
}

/** Returns the size of each dim at one use, and the attributes. Throws a BrokenInvariant where shapes disagree. */
function sizesOf(node: Pick<Node, "op" | "args" | "attrs">): Record<string, number> {
  const size: Record<string, number> = { ...node.attrs };
  for (const [i, { dimSpecs, name }] of expand(node).inputs.entries()) {
    const have = node.args[i]!.sizes;
    invariant(
      have.length === dimSpecs.length,
      () => `${node.op.name}.${name}: ${have.length} dims where the signature has ${dimSpecs.length}`,
    );
    for (const [j, s] of dimSpecs.entries()) {
      const n = (have[j]! * sharersOf(s, size)) / s.inner.reduce((p, d) => p * size[d]!, 1);
      invariant((size[s.dim] ??= n) === n && Number.isInteger(n), () => `${node.op.name}.${name}: ${s.dim} is ${size[s.dim]} and ${n}`);
    }
  }
  return size;
}
