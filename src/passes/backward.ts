/**
 * Reverse-mode differentiation of the graph. The pass names no op except `add`, which sums the addends of a gradient.
 */
import type { InputSource } from "../../schemas/plan.ts";
import { isCount, type Loss } from "../model/builder.ts";
import { add } from "../ops/linear.ts";
import { invariant, type Node, type Value } from "../ops/op.ts";
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

/**
 * Extends the graph of the losses by the gradient of each parameter. Parameters with a custom update rule (expert bias) get their
 * update input instead of a gradient. Backward recomputes the outputs of the nodes for which `isRecomputed` returns true: it reads
 * clones of them. Throws an invariant if a parameter or a value that is differentiated has no gradient.
 */
export function addBackward(losses: readonly Loss[], isRecomputed: (node: Node) => boolean = () => false): Graph {
  const outcomes = losses.map((l) => l.value);
  const counted = new Map(
    topological(outcomes)
      .flatMap((n) => n.args)
      .flatMap((v) => (v.leaf?.updateInput ? [[v, v.leaf.updateInput]] : [])),
  );
  // sorted by position: an update input is computed in its layer, not after the loss
  const positionOf = ({ node }: Value): number => node?.position ?? 0;
  const forward = topological([...counted.values(), ...outcomes].sort((a, b) => positionOf(a) - positionOf(b)));
  const backward = new Backward(losses, forward, counted, isRecomputed);
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
    return (v.node && this.#clones.get(v.node)?.outs[v.out]) ?? v;
  }
  /** Clones a node. The arguments that are recomputed must have their clones already. */
  #clone({ op, args, attrs, id, position, pin, ring, regrid, outs }: Node): Node {
    const named = Object.fromEntries(pairs(op.inputs, args).map(([{ name }, arg]) => [name, this.#cloneOf(arg)]));
    const [made] = Object.values(op.all(named, attrs, `${id}.again`));
    invariant(made?.node !== undefined, `${id} has no outputs`);
    for (const [out, { dtype }] of pairs(made.node.outs, outs)) out.dtype = dtype;
    return Object.assign(made.node, { position, pin, ring, regrid, backward: true });
  }
}

/** The backward nodes and the gradients of a graph. */
class Backward {
  readonly nodes: Node[] = [];
  readonly grad: Map<Value, Value>;
  readonly parameterGrads: Map<Value, Value[]>;
  readonly gradOf: Map<Value, Value>;
  readonly #seen: Set<Node>;
  readonly #idCounts: Map<string, number>;
  readonly #recomputed: Recomputed;
  readonly #seeds = new Map<string, Value>();

  /** `counted` maps each parameter with a custom update rule to its update input. */
  constructor(
    losses: readonly Loss[],
    forward: readonly Node[],
    counted: ReadonlyMap<Value, Value>,
    isRecomputed: (node: Node) => boolean,
  ) {
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
    for (const [name, part] of Object.entries(op.grad(operands, { y: this.#recomputed.read(y), dy, dys }, attrs))) {
      const v = named.get(name);
      invariant(v !== undefined, `${op.name} has a gradient of ${name}, which is not an input`);
      if (v.leaf?.kind !== "input") this.#add(node, v, part, part.node !== undefined && part !== dy);
    }
  }

  /** Adds an addend of the gradient of an argument of a node. `isNew`: an op of the gradient produces it. */
  #add(node: Node, v: Value, part: Value, isNew: boolean): void {
    this.#adopt(part, node);
    if (v.leaf) {
      invariant(isNew, `${node.id}: the gradient of a parameter must be the output of a new op`);
      part.dtype = "f32"; // gradients accumulate in f32
      this.parameterGrads.set(v, [...(this.parameterGrads.get(v) ?? []), part]);
      this.gradOf.set(part, v);
      return;
    }
    if (isNew) part.dtype = v.dtype;
    const before = this.grad.get(v);
    const sum = before ? add.of({ a: before, b: part }) : part;
    if (before) this.#adopt(sum, node, `${idOf(v)}.grad_sum`);
    for (const g of [part, sum]) if (g.leaf === undefined && !this.gradOf.has(g)) this.gradOf.set(g, v);
    this.grad.set(v, sum);
  }

  /** Appends the new nodes that a value depends on. They get ids after the node whose gradient they are, and run on its stage. */
  #adopt(v: Value, from: Node, id = ""): void {
    for (const n of topological([v], this.#seen)) {
      this.nodes.push(n);
      // a clone has its own id, position and pins
      if (n.backward) continue;
      n.id = this.#unique(id || `${from.id}.${n.op.suffix ?? "grad"}`);
      n.position = from.position;
      n.backward = true;
      if (n.op !== add) Object.assign(n, { pin: from.pin, ring: from.ring });
    }
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

/**
 * Returns the nodes that the roots depend on and that are not in `seen`, each after its arguments, in depth-first order. Adds them to
 * `seen`. The search keeps an explicit stack, since a chain of nodes grows with the number of layers.
 */
function topological(roots: readonly Value[], seen = new Set<Node>()): Node[] {
  const order: Node[] = [];
  const open: { readonly node: Node; next: number }[] = [];
  const visit = ({ node }: Value): void => {
    if (!node || seen.has(node)) return;
    seen.add(node);
    open.push({ node, next: 0 });
  };
  for (const root of roots) {
    visit(root);
    for (let top = open.at(-1); top; top = open.at(-1)) {
      const arg = top.node.args[top.next++];
      if (arg) visit(arg);
      else {
        order.push(top.node);
        open.pop();
      }
    }
  }
  return order;
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
