/**
 * Reverse-mode differentiation of the graph. The pass names no op except `add`, which sums the addends of a gradient.
 */
import type { Dtype } from "../../schemas/dtypes.ts";
import type { InputSource } from "../../schemas/plan.ts";
import { isCount, type Loss, type ModelGraph } from "../model/builder.ts";
import { add } from "../ops/gemm.ts";
import { changed, invariant, type Node, nodeOf, outputOf, type Value } from "../ops/op.ts";
import { topological } from "./graphOrder.ts";
import { pairs } from "./layout.ts";

/** Forward and backward nodes of one microbatch, before sharding. */
export interface Graph {
  readonly losses: readonly Loss[];
  readonly parameters: readonly Value[];
  /** Forward nodes, then backward nodes, each in an order in which they can run. */
  readonly order: readonly Node[];
  /** The complete gradient of each activation. */
  readonly grad: ReadonlyMap<Value, Value>;
  /** Per parameter, one addend of its gradient for each use. A parameter with a custom update rule has its update input here instead. */
  readonly parameterGrads: ReadonlyMap<Value, readonly Value[]>;
  /** Maps each gradient, complete or an addend, to the value that it is the gradient of. */
  readonly gradOf: ReadonlyMap<Value, Value>;
}

/** Decisions of the job that `addBackward` needs. */
export interface BackwardOptions {
  /** Returns whether backward recomputes the outputs of a node; by default none. */
  readonly isRecomputed?: (node: Node) => boolean;
  /** Returns the type in which the gradient of a parameter is summed up; by default f32. */
  readonly gradientType?: (parameter: Value) => Dtype;
}

/**
 * Extends the graph of a model by the gradient of each parameter. Parameters with a custom update rule (expert bias) get their
 * update input instead of a gradient. Backward recomputes the outputs of the nodes for which `isRecomputed` returns true: it reads
 * clones of them. Throws an invariant if a parameter or a value that is differentiated has no gradient.
 */
export function addBackward(
  { losses, updateInputs }: ModelGraph,
  { isRecomputed = () => false, gradientType = () => "f32" }: BackwardOptions = {},
): Graph {
  const outcomes = losses.map((l) => l.value);
  const counted = new Map(
    topological(outcomes)
      .flatMap((n) => n.args)
      .flatMap((v) => {
        const input = updateInputs.get(v);
        return input ? [[v, input] as const] : [];
      }),
  );
  // sorted by position: an update input is computed in its layer, not after the loss
  const positionOf = ({ node }: Value): number => node?.position ?? 0;
  const forward = topological([...counted.values(), ...outcomes].sort((a, b) => positionOf(a) - positionOf(b)));
  const backward = new Backward(losses, forward, counted, { isRecomputed, gradientType });
  for (const node of forward.toReversed()) backward.differentiate(node);

  const { nodes, grad, parameterGrads, gradOf } = backward;
  const args = forward.flatMap((n) => n.args);
  const leaves = new Set(args.flatMap((v) => v.leaf?.name ?? []));
  for (const { id } of [...forward, ...nodes]) invariant(!leaves.has(id), `${id} names both an op and a leaf`);
  const parameters = [...new Set(args.filter((v) => v.leaf?.kind === "parameter"))];
  for (const p of parameters) invariant(parameterGrads.has(p), `${idOf(p)} has no gradient`);
  return { losses, parameters, order: [...forward, ...nodes], grad, parameterGrads, gradOf };
}

/** Clones of forward nodes, which backward runs again. */
class Recomputed {
  readonly #clones = new Map<Node, Node>();
  readonly #isRecomputed: (node: Node) => boolean;

  constructor(isRecomputed: (node: Node) => boolean) {
    this.#isRecomputed = isRecomputed;
  }

  /** Returns the value or its clone. Clones arguments first, on an explicit stack: a chain of clones may be as long as the model. */
  read(v: Value): Value {
    const open = this.#isMissing(v.node) ? [v.node] : [];
    for (let node = open.at(-1); node; node = open.at(-1)) {
      const missing = node.args.map((arg) => arg.node).filter((n): n is Node => this.#isMissing(n));
      if (missing.length > 0) open.push(...missing.reverse());
      else {
        if (this.#isMissing(node)) this.#clones.set(node, this.#clone(node));
        open.pop();
      }
    }
    return this.#cloneOf(v);
  }

  #isMissing(node: Node | undefined): node is Node {
    return node !== undefined && this.#isRecomputed(node) && !this.#clones.has(node);
  }
  #cloneOf(v: Value): Value {
    return outputIn(this.#clones, v);
  }
  /** Clones a node. The arguments that are recomputed must have their clones already. */
  #clone({ op, args, attrs, id, position, pins, ring, regrid, outs }: Node): Node {
    const operands = args.map((arg) => this.#cloneOf(arg));
    const made = nodeOf(op, operands, attrs, `${id}.again`);
    const typed = pairs(made.outs, outs).map(([out, { dtype }]) => ({ ...out, dtype }));
    return changed(made, { position, pins, ring, regrid, backward: true, outs: typed });
  }
}

/** Returns the output of the node that replaces the node of a value; the value itself if none does. */
function outputIn(replaced: ReadonlyMap<Node, Node>, v: Value): Value {
  const node = v.node && replaced.get(v.node);
  return node ? outputOf(node, v.out) : v;
}

/** The backward nodes and the gradients of a graph. */
class Backward {
  readonly nodes: Node[] = [];
  readonly grad: Map<Value, Value>;
  readonly parameterGrads: Map<Value, Value[]>;
  readonly gradOf: Map<Value, Value>;
  readonly #seen: Set<Node>;
  readonly #idCounts: Map<string, number>;
  /** The nodes of backward in place of those that gradients of ops return: the latter have no id and no position. */
  readonly #adopted = new Map<Node, Node>();
  readonly #recomputed: Recomputed;
  readonly #gradientType: (parameter: Value) => Dtype;
  readonly #seeds = new Map<string, Value>();

  /** `counted` maps each parameter with a custom update rule to its update input. */
  constructor(
    losses: readonly Loss[],
    forward: readonly Node[],
    counted: ReadonlyMap<Value, Value>,
    { isRecomputed, gradientType }: Required<BackwardOptions>,
  ) {
    this.#gradientType = gradientType;
    this.grad = new Map(losses.flatMap((l) => (isCount(l.name) ? [] : [[l.value, this.#seed(l.weight ?? "one")]])));
    this.parameterGrads = new Map(Array.from(counted, ([v, input]) => [v, [input]]));
    this.gradOf = new Map(Array.from(counted, ([v, input]) => [input, v]));
    this.#seen = new Set(forward);
    this.#idCounts = new Map(forward.map((n) => [n.id, 1]));
    this.#recomputed = new Recomputed(isRecomputed);
  }

  /** Adds the gradients of the arguments of a node, if a loss depends on its first output. */
  differentiate(node: Node): void {
    const { op, args, attrs, outs } = node;
    const [y] = outs;
    const dy = y && this.grad.get(y);
    if (!y || !dy || !op.grad) return;
    const byName = new Map(pairs(op.outputs, outs).map(([{ name }, v]) => [name, v]));
    const differentiated = op.gradOutputs?.flatMap((name) => byName.get(name) ?? []) ?? [y];
    const dys = differentiated.map((v) => {
      const arrived = this.grad.get(v);
      invariant(arrived !== undefined, `${idOf(v)} has no gradient: no node uses it`);
      return arrived;
    });
    const named = new Map(pairs(op.inputs, args).map(([{ name }, v]) => [name, v]));
    const operands = Object.fromEntries(Array.from(named, ([name, v]) => [name, this.#recomputed.read(v)]));
    const addends = Object.entries(op.grad(operands, { y: this.#recomputed.read(y), dy, dys }, attrs)).flatMap(([name, part]) => {
      const v = named.get(name);
      invariant(v !== undefined, `${op.name} has a gradient of ${name}, which is not an input`);
      return v.leaf?.kind === "input" ? [] : [{ v, part }];
    });
    const types = new Map(addends.map(({ v, part }) => [part, v.leaf ? this.#gradientType(v) : v.dtype]));
    for (const { v, part } of addends) this.#add(node, v, this.#adopt(part, node, types), part.node !== undefined && part !== dy);
  }

  /** Adds an addend of the gradient of an argument of a node. `isNew`: an op of the gradient produces it. */
  #add(node: Node, v: Value, part: Value, isNew: boolean): void {
    if (v.leaf) {
      invariant(isNew, `${node.id}: the gradient of a parameter must be the output of a new op`);
      this.parameterGrads.set(v, [...(this.parameterGrads.get(v) ?? []), part]);
      this.gradOf.set(part, v);
      return;
    }
    const before = this.grad.get(v);
    const named = { id: `${idOf(v)}.grad_sum`, at: v.node?.namedAt ?? v.node?.position };
    const sum = before ? this.#adopt(add.of({ a: before, b: part }), node, new Map(), named) : part;
    for (const g of [part, sum]) if (g.leaf === undefined && !this.gradOf.has(g)) this.gradOf.set(g, v);
    this.grad.set(v, sum);
  }

  /**
   * Appends the new nodes that a value depends on. They get ids after the node whose gradient they are, and run on its stage. Returns the
   * value as a result of the appended nodes. `types`: the types of results that differ from those of the ops. `named`: the id, and the position
   * that it names, if they are not those of `from`.
   */
  #adopt(
    v: Value,
    from: Node,
    types: ReadonlyMap<Value, Value["dtype"]>,
    named?: { readonly id: string; readonly at: number | undefined },
  ): Value {
    for (const n of topological([v], this.#seen)) {
      // a clone has its own id, position and pins
      if (n.backward) {
        this.nodes.push(n);
        continue;
      }
      const made = changed(n, {
        ...{ id: this.#unique(named?.id ?? `${from.id}.${n.op.suffix ?? "grad"}`), position: from.position, backward: true },
        ...(named && { namedAt: named.at }),
        ...(n.op !== add && { pins: from.pins, ring: from.ring }),
        args: n.args.map((arg) => outputIn(this.#adopted, arg)),
        outs: n.outs.map((out) => ({ ...out, dtype: types.get(out) ?? out.dtype })),
      });
      this.#adopted.set(n, made);
      this.#seen.add(made);
      this.nodes.push(made);
    }
    return outputIn(this.#adopted, v);
  }
  #unique(id: string): string {
    const n = (this.#idCounts.get(id) ?? 0) + 1;
    this.#idCounts.set(id, n);
    return n === 1 ? id : `${id}${n}`;
  }
  /** Returns the program input that is the gradient of a loss with respect to itself. */
  #seed(name: InputSource): Value {
    const leaf = { kind: "input", name, position: 0, source: { source: name } } as const;
    const value = this.#seeds.get(name) ?? { out: 0, sizes: [], ragged: 0, fanout: 0, dtype: "f32", leaf, shardAxes: [] };
    this.#seeds.set(name, value);
    return value;
  }
}

/** Returns the stable name of a value: the name of its leaf or node. A node with several outputs appends the name of the output. */
export function idOf({ leaf, node, out }: Value): string {
  if (leaf) return leaf.name;
  invariant(node !== undefined, "a value has neither a leaf nor a node");
  return node.outs.length > 1 ? `${node.id}.${node.op.outputs[out]?.name}` : node.id;
}

/** Prints a graph before sharding, one line per node. */
export function printGraph({ order }: Graph): string {
  const shape = (v: Value) => `${v.dtype}[${v.ragged ? ["rows", ...v.sizes.slice(v.ragged)].join(",") : v.sizes.join(",")}]`;
  return order
    .map((n) => `${n.backward ? "bwd" : "fwd"} ${n.id} = ${n.op.name}(${n.args.map(idOf).join(", ")}) -> ${n.outs.map(shape).join(", ")}\n`)
    .join("");
}
