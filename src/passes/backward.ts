/**
 * Reverse-mode differentiation of the graph. The pass names no op except `add`, which sums the addends of a gradient.
 */
import type { InputSource } from "../../schemas/plan.ts";
import { isCount, type Loss } from "../model/builder.ts";
import { add } from "../ops/linear.ts";
import { invariant, type Node, type Value } from "../ops/op.ts";

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
  const counted = [...new Set(topological(outcomes).flatMap((n) => n.args))].filter((v) => v.leaf?.updateInput);
  // sorted by position: an update input is computed in its layer, not after the loss
  const forward = topological(
    [...counted.map((v) => v.leaf!.updateInput!), ...outcomes].sort((a, b) => a.node!.position - b.node!.position),
  );
  const seen = new Set(forward);
  const clones = new Map<Node, Node>();
  const cloneOf = (v: Value): Value => (v.node && clones.get(v.node)?.outs[v.out]) ?? v;
  /** Clones a node. The arguments that are recomputed must have their clones already. */
  const clone = ({ op, args, attrs, id, position, pin, ring, regrid, outs }: Node): Node => {
    const made = op.all(Object.fromEntries(op.inputs.map((t, i) => [t.name, cloneOf(args[i]!)])), attrs, `${id}.again`);
    const { node } = Object.values(made)[0]!;
    invariant(node !== undefined, `${id} has no outputs`);
    for (const [i, out] of node.outs.entries()) out.dtype = outs[i]!.dtype;
    return Object.assign(node, { position, pin, ring, regrid, backward: true });
  };
  const isMissing = (node: Node | undefined): node is Node => node !== undefined && isRecomputed(node) && !clones.has(node);
  /** Returns the value or its clone. Clones arguments first, on an explicit stack: a chain of clones may be as long as the model. */
  const readInBackward = (v: Value): Value => {
    const open = isMissing(v.node) ? [v.node] : [];
    for (let node = open.at(-1); node; node = open.at(-1)) {
      const missing = node.args.map((arg) => arg.node).filter(isMissing);
      if (missing.length > 0) open.push(...missing.reverse());
      else {
        if (isMissing(node)) clones.set(node, clone(node));
        open.pop();
      }
    }
    return cloneOf(v);
  };
  const seeds = new Map<string, Value>();
  /** Returns the program input that is the gradient of a loss with respect to itself. */
  const seed = (name: InputSource): Value => {
    const leaf = { kind: "input", name, position: 0, source: { source: name } } as const;
    const value = seeds.get(name) ?? { out: 0, sizes: [], ragged: 0, fanout: 0, dtype: "f32", leaf, shardAxes: [] };
    seeds.set(name, value);
    return value;
  };
  const grad = new Map<Value, Value>(losses.filter((l) => !isCount(l.name)).map((l) => [l.value, seed(l.weight ?? "one")]));
  const parameterGrads = new Map<Value, Value[]>(counted.map((v) => [v, [v.leaf!.updateInput!]]));
  const gradOf = new Map<Value, Value>(counted.map((v) => [v.leaf!.updateInput!, v]));
  const idCounts = new Map<string, number>(forward.map((n) => [n.id, 1]));
  const back: Node[] = [];

  const unique = (id: string) => {
    const n = (idCounts.get(id) ?? 0) + 1;
    idCounts.set(id, n);
    return n === 1 ? id : `${id}${n}`;
  };
  const adopt = (v: Value, from: Node, id?: string) => {
    for (const n of topological([v], seen)) {
      back.push(n);
      // a clone has its own id, position and pins
      if (n.backward) continue;
      n.id = unique(id ?? `${from.id}.${n.op.suffix ?? "grad"}`);
      n.position = from.position;
      n.backward = true;
      if (n.op !== add) Object.assign(n, { pin: from.pin, ring: from.ring });
    }
  };

  for (const node of forward.toReversed()) {
    const y = node.outs[0]!;
    const dy = grad.get(y);
    if (!dy || !node.op.grad) continue;
    const differentiated = node.op.gradOutputs?.map((name) => node.outs[node.op.outputs.findIndex((o) => o.name === name)]!) ?? [y];
    const dys = differentiated.map((v) => {
      const arrived = grad.get(v);
      invariant(arrived !== undefined, `${idOf(v)} has no gradient: no node uses it`);
      return arrived;
    });
    const named = Object.fromEntries(node.op.inputs.map((t, i) => [t.name, node.args[i]!]));
    const operands = Object.fromEntries(Object.entries(named).map(([name, v]) => [name, readInBackward(v)]));
    for (const [name, part] of Object.entries(node.op.grad(operands, { y: readInBackward(y), dy, dys }, node.attrs))) {
      const v = named[name]!;
      if (v.leaf?.kind === "input") continue;
      adopt(part, node);
      const made = part.node !== undefined && part !== dy;
      if (v.leaf) {
        invariant(made, `${node.id}: the gradient of a parameter must be the output of a new op`);
        part.dtype = "f32"; // gradients accumulate in f32
        parameterGrads.set(v, [...(parameterGrads.get(v) ?? []), part]);
        gradOf.set(part, v);
        continue;
      }
      if (made) part.dtype = v.dtype;
      const before = grad.get(v);
      const sum = before ? add.of({ a: before, b: part }) : part;
      if (before) adopt(sum, node, `${idOf(v)}.grad_sum`);
      for (const g of [part, sum]) if (g.leaf === undefined && !gradOf.has(g)) gradOf.set(g, v);
      grad.set(v, sum);
    }
  }
  const leaves = new Set(forward.flatMap((n) => n.args).flatMap((v) => v.leaf?.name ?? []));
  for (const { id } of [...forward, ...back]) invariant(!leaves.has(id), `${id} names both an op and a leaf`);
  const parameters = [...new Set(forward.flatMap((n) => n.args).filter((v) => v.leaf?.kind === "parameter"))];
  for (const p of parameters) invariant(parameterGrads.has(p), `${idOf(p)} has no gradient`);
  return { losses, parameters, order: [...forward, ...back], grad, parameterGrads, gradOf };
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
export const idOf = (v: Value): string =>
  v.leaf ? v.leaf.name : v.node!.outs.length > 1 ? `${v.node!.id}.${v.node!.op.outputs[v.out]!.name}` : v.node!.id;

/** Prints a graph before sharding, one line per node. */
export function printGraph({ order }: Graph): string {
  const shape = (v: Value) => `${v.dtype}[${v.ragged ? ["rows", ...v.sizes.slice(v.ragged)].join(",") : v.sizes.join(",")}]`;
  return order
    .map((n) => `${n.backward ? "bwd" : "fwd"} ${n.id} = ${n.op.name}(${n.args.map(idOf).join(", ")}) -> ${n.outs.map(shape).join(", ")}\n`)
    .join("");
}
