/**
 * An op is one declaration. From its signature line come the argument names, the shape rule, the bytes touched and,
 * per output, the cut rule: a dim that stands in the output is concatenated, one that stands only in the inputs owes a sum.
 *
 *   D!      read whole: may not be cut
 *   G*M*C   one dim in memory; only its leading factor may be cut, the others are attributes
 *   G/N*C   N neighbours of G share an element: factors that cut G finer than that leave it whole; N is an attribute, 1 if absent
 *   B~S~E   one ragged dim: the rows (b,s,e) that exist, sorted by e, then b, then s; each of B, S, E may be cut
 *   ...     any dims, the same for every operand that says so
 */
import type { Dtype } from "../../schemas/plan.ts";

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

export type Attrs = Readonly<Record<string, number>>;
export type Grads = Readonly<Record<string, Value>>;

/** The first output and its gradient; and the gradients of all outputs that carry one. */
export interface OutputGrads {
  readonly y: Value;
  readonly dy: Value;
  readonly dys: readonly Value[];
}

/** What a cut op knows besides its local sizes. It never divides by a local size: constants of the job are attributes. */
export interface ShardContext {
  /** The global index of a dim's first local element; local pieces are contiguous. */
  start(dim: string): number;
  /** The rows of the ragged operands: [count, b0, s0, e0, b1, …], global coordinates. */
  readonly rows: Int32Array;
}

export interface Declaration<S extends string> {
  readonly name: string;
  readonly sig: S;
  /** What an output owes over a dim it lost; a sum if not said. `merge`: attention_merge of the pieces' outputs, which a graph cannot owe. */
  readonly reduction?: "max" | "merge";
  /** f(a+a', b+b') = f(a,b) + f(a',b'): sums owed by all inputs may stay owed by the output. */
  readonly linear?: true;
  /** f is linear in this input alone: a sum that copies of the same rows owe of it may stay owed by all outputs. */
  readonly linearIn?: In<S>;
  /** Types of outputs that are not simply that of the first float input. */
  readonly types?: Partial<Each<Out<S>, Dtype>>;
  /** Outputs through which a gradient arrives, in the order of `dys`; the first if not said. */
  readonly gradOutputs?: readonly Out<S>[];
  /** Last part of the id of a backward node; `grad` if not said. */
  readonly suffix?: string;
  /** Outputs that `cpu` reads and updates in place; all others it finds zeroed. */
  readonly inPlace?: readonly Out<S>[];
  /** Of outputs that are updated: the attribute that they may not exceed in a step. The run ends with an error where one does. */
  readonly limits?: Partial<Each<Out<S>, string>>;
  /** Attributes that a kernel is told at launch, as 32 bits: uses that differ in them alone are one kernel. */
  readonly runtimeAttrs?: readonly string[];
  /** Floating-point operations at these sizes (local, or global: the same formula); R is the number of rows. */
  flops?(d: Each<Dim<S> | "R", number> & Attrs): number;
  /** The reference: plain loops over local pieces. bf16 values arrive as f32, and are rounded when stored. */
  cpu(t: Each<In<S> | Out<S>, Float32Array>, d: Each<Dim<S>, number> & Attrs, p: ShardContext): void;
  /** For ops that make a ragged value out of dense ones: writes [count, b, s, e, …] (global) into `rows`, at most `bound` rows; returns the count needed. */
  rows?(t: Each<In<S>, Float32Array>, d: Each<Dim<S>, number> & Attrs, p: ShardContext, rows: Int32Array, bound: number): number;
  /** Gradient of each differentiable input, as ops. A name left out takes no gradient. */
  grad?(t: Each<In<S>, Value>, g: OutputGrads, a: Attrs): Grads;
}

export interface DimSpec {
  readonly dim: string;
  readonly inner: readonly string[];
  /** The attribute that says how many neighbours along the dim share an element. */
  readonly shared?: string;
  readonly replicated: boolean;
}
/** `ragged` counts the leading slots that share the first dim in memory; `any` says `...`. */
export interface Operand {
  readonly name: string;
  readonly dimSpecs: readonly DimSpec[];
  readonly ragged: number;
  readonly any: boolean;
}
/** An op as the passes and the runtime see it: names are strings. */
export interface AnyOp
  extends Omit<Declaration<string>, "cpu" | "rows" | "grad" | "flops" | "types" | "inPlace" | "limits" | "gradOutputs" | "linearIn"> {
  /** Applies the op; its outputs by name. */
  all(args: Readonly<Record<string, Value>>, attrs?: Attrs, id?: string): Readonly<Record<string, Value>>;
  readonly inputs: readonly Operand[];
  readonly outputs: readonly Operand[];
  readonly linearIn?: string;
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
export interface Op<S extends string> extends AnyOp {
  /** Applies the op; the first output. */
  of(args: Each<In<S>, Value>, attrs?: Attrs, id?: string): Value;
  all(args: Each<In<S>, Value>, attrs?: Attrs, id?: string): Each<Out<S>, Value>;
}

export interface Quota {
  readonly rows: number;
  readonly sequences: number;
  readonly positions: number;
}
/** A logical tensor of the graph: global sizes, one per slot (a ragged value has its ragged slots first). */
export interface Value {
  readonly node?: Node;
  readonly out: number;
  readonly sizes: readonly number[];
  readonly ragged: number;
  /** Rows per (b,s) of a ragged value at most: the router's top_k. */
  readonly fanout: number;
  /** … and per expert, of any group of so many sequences and positions. */
  readonly quota?: Quota;
  readonly leaf?: Leaf;
  dtype: Dtype;
  /** Per slot, the axes it is declared to be cut along; absent: as it falls out. */
  shardAxes?: readonly (readonly string[])[];
}
/** A parameter or an input. */
export interface Leaf {
  readonly kind: "parameter" | "input";
  readonly name: string;
  readonly position: number;
  readonly init?: { readonly type: "normal" | "ones" | "zeros"; readonly std: number };
  /** A parameter that no gradient teaches: a step updates it by an op of what was counted in it. */
  readonly rule?: { readonly name: "expert_bias" | "quantile"; readonly op: AnyOp; readonly attrs: Attrs };
  /** … the value of the forward pass whose sum over the step that is. */
  updateInput?: Value;
  /** The parameter of another stage that this one is a copy of, under the same name. */
  readonly tiedTo?: Value;
}
/** Per slot the axes that cut it, outermost first, on both sides of a seam: all of one grid, then all of the other. */
export interface Regrid {
  readonly from: NonNullable<Value["shardAxes"]>;
  readonly to: NonNullable<Value["shardAxes"]>;
}
export interface Node {
  readonly op: AnyOp;
  readonly args: readonly Value[];
  readonly attrs: Attrs;
  readonly outs: Value[];
  /** What each dim measures here (global sizes), attributes included. */
  readonly size: Readonly<Record<string, number>>;
  id: string;
  /** Where in the model it stands, which decides its stage: 0 the embedding, from 1 on the layers, last the head. */
  position: number;
  backward: boolean;
  /** The dim that an axis cuts; without a dim, it cuts none, and its ranks repeat the work. */
  pin?: { readonly dim?: string; readonly axis: string; readonly path: string } | undefined;
  /** A dim that is read whole need not be brought: its pieces, cut as another dim is, go around the ranks (ring.ts). */
  ring?: { readonly dim: string; readonly as: string; readonly path: string } | undefined;
  /** Of `fold` (fold.ts): by which axes its input is cut, and its output. */
  regrid?: Regrid | undefined;
}

export function op<const S extends string>(def: Declaration<S>): Op<S> {
  const [inputs = [], outputs = []] = def.sig.split(" -> ").map(operands);
  const all = (named: Each<In<S>, Value>, attrs: Attrs = {}, id = "") => {
    const args = inputs.map((i) => named[i.name as In<S>]);
    const position = Math.max(...args.map((v) => v.node?.position ?? v.leaf!.position));
    const size = sizesOf({ op: self, args, attrs });
    const node: Node = { op: self, args, attrs, outs: [], size, id, position, backward: false };
    const like = args.find((v) => v.dtype !== "i32")?.dtype ?? "f32";
    const rows = args.find((v) => v.ragged) ?? { fanout: attrs.k ?? 0, ...(attrs.quota ? { quota: quotaOf(attrs) } : {}) };
    for (const [out, o] of expand(node).outputs.entries())
      node.outs.push({
        node,
        out,
        ragged: o.ragged,
        fanout: o.ragged ? rows.fanout : 0,
        ...(o.ragged && rows.quota ? { quota: rows.quota } : {}),
        sizes: o.dimSpecs.map((s) => dimSize(s, size)),
        dtype: self.types?.[o.name] ?? like,
      });
    return Object.fromEntries(outputs.map((o, i) => [o.name, node.outs[i]!])) as Each<Out<S>, Value>;
  };
  const self: Op<S> = {
    ...(def as unknown as AnyOp),
    inputs,
    outputs,
    all,
    of: (named, attrs, id) => all(named, attrs, id)[outputs[0]!.name as Out<S>],
  };
  return self;
}

/** Of an op that makes rows: `k` of a token at most, `quota` of an expert in each group. */
const quotaOf = ({ quota, sequences, positions }: Attrs): Quota => ({ rows: quota!, sequences: sequences!, positions: positions! });

/** An op's operands at one use: `...` replaced by as many dims as the argument has. */
export function expand({ op: o, args }: Pick<Node, "op" | "args">): { inputs: readonly Operand[]; outputs: readonly Operand[] } {
  const like = args[o.inputs.findIndex((i) => i.any)];
  return expandLike(o, like ? { dimSpecs: like.sizes.length, ragged: like.ragged } : undefined);
}
/** The same when only the shape of a `...` argument is known. */
export function expandLike(o: AnyOp, like: { dimSpecs: number; ragged: number } | undefined): Pick<AnyOp, "inputs" | "outputs"> {
  if (!like) return o;
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

/** How many neighbours along a slot's dim share an element. */
export const sharersOf = ({ shared }: DimSpec, size: Readonly<Record<string, number>>): number =>
  shared === undefined ? 1 : (size[shared] ?? 1);

/** Elements of one slot: its dim, by those who share an element, times its inner dims. A piece of some who share one has that one. */
export const dimSize = (s: DimSpec, size: Readonly<Record<string, number>>): number =>
  s.inner.reduce((n, d) => n * size[d]!, Math.max(1, size[s.dim]! / sharersOf(s, size)));

/** What each dim measures at one use. Throws where shapes disagree. */
function sizesOf(node: Pick<Node, "op" | "args" | "attrs">): Record<string, number> {
  const size: Record<string, number> = { ...node.attrs };
  for (const [i, { dimSpecs, name }] of expand(node).inputs.entries()) {
    const have = node.args[i]!.sizes;
    invariant(have.length === dimSpecs.length, `${node.op.name}.${name}: ${have.length} dims where the signature has ${dimSpecs.length}`);
    for (const [j, s] of dimSpecs.entries()) {
      const n = (have[j]! * sharersOf(s, size)) / s.inner.reduce((p, d) => p * size[d]!, 1);
      invariant((size[s.dim] ??= n) === n && Number.isInteger(n), `${node.op.name}.${name}: ${s.dim} is ${size[s.dim]} and ${n}`);
    }
  }
  return size;
}

/** A law that rankc's own output obeys is broken: a bug where rankc compiles, damage where it reads a plan. */
export class BrokenInvariant extends Error {
  constructor(readonly law: string) {
    super(`rankc: broken invariant: ${law}`);
  }
}
/** Throws a BrokenInvariant with the message where the condition is false; a function makes the text only then, for checks in loops. */
export function invariant(ok: boolean, message: string | (() => string)): asserts ok {
  if (!ok) throw new BrokenInvariant(typeof message === "string" ? message : message());
}

function operands(side: string): Operand[] {
  return [...side.matchAll(/(\w+)\[([^\]]*)\]/g)].map(([, name, text]) => {
    const parts = text!.split(",").filter(Boolean);
    const dimSpecs = parts
      .flatMap((p) => p.split("~"))
      .map((p) => {
        const [outer, ...inner] = p.replace("!", "").split("*");
        const [dim, shared] = outer!.split("/");
        return { dim: dim!, inner, ...(shared === undefined ? {} : { shared }), replicated: p.endsWith("!") };
      });
    return { name: name!, dimSpecs, ragged: parts[0]?.includes("~") ? parts[0].split("~").length : 0, any: text === "..." };
  });
}
