/**
 * addBackward: Graph → Graph, extended by the gradient of each parameter, or what is counted in its place. Names no op but `add`,
 * which sums the parts of a gradient.
 */
import { isCount, type Loss } from "../model/builder.ts";
import { add } from "../ops/linear.ts";
import { invariant, type Node, type Value } from "../ops/op.ts";

export interface Graph {
  readonly losses: readonly Loss[];
  readonly parameters: readonly Value[];
  /** Forward nodes, then backward nodes, each in an order in which they can run. */
  readonly order: readonly Node[];
  /** The complete gradient of each activation. */
  readonly grad: ReadonlyMap<Value, Value>;
  /** What each use of a parameter adds to its gradient; of one without a gradient, what is counted. */
  readonly parameterGrads: ReadonlyMap<Value, readonly Value[]>;
  /** A gradient, whole or in part, and the value it is the gradient of. */
  readonly gradOf: ReadonlyMap<Value, Value>;
}

/** `again` says which nodes' outputs backward makes once more, from what it has: it sees clones of them. */
export function addBackward(losses: readonly Loss[], again: (node: Node) => boolean = () => false): Graph {
  const outcomes = losses.map((l) => l.value);
  const counted = [...new Set(topological(outcomes).flatMap((n) => n.args))].filter((v) => v.leaf?.updateInput);
  // a count belongs to its layer, not behind the loss
  const forward = topological(
    [...counted.map((v) => v.leaf!.updateInput!), ...outcomes].sort((a, b) => a.node!.position - b.node!.position),
  );
  const seen = new Set(forward);
  const clones = new Map<Node, Node>();
  const sees = (v: Value): Value => (v.node && clones.get(v.node)?.outs[v.out]) ?? v;
  /** Clones a node whose arguments have their clones. */
  const clone = ({ op, args, attrs, id, position, pin, ring, regrid, outs }: Node): Node => {
    const made = op.all(Object.fromEntries(op.inputs.map((t, i) => [t.name, sees(args[i]!)])), attrs, `${id}.again`);
    const { node } = Object.values(made)[0]!;
    invariant(node !== undefined, `${id} has no outputs`);
    for (const [i, out] of node.outs.entries()) out.dtype = outs[i]!.dtype;
    return Object.assign(node, { position, pin, ring, regrid, backward: true });
  };
  const isMissing = (node: Node | undefined): node is Node => node !== undefined && again(node) && !clones.has(node);
  /** The value itself, or its clone. Arguments are cloned first, from a stack: a chain of clones may be as long as the model. */
  const backwardSees = (v: Value): Value => {
    const open = isMissing(v.node) ? [v.node] : [];
    for (let node = open.at(-1); node; node = open.at(-1)) {
      const missing = node.args.map((arg) => arg.node).filter(isMissing);
      if (missing.length > 0) open.push(...missing.reverse());
      else {
        if (isMissing(node)) clones.set(node, clone(node));
        open.pop();
      }
    }
    return sees(v);
  };
  const begins = new Map<string, Value>();
  /** What the gradient of a loss begins with. */
  const begin = (name: string): Value => {
    const leaf = { kind: "input", name, position: 0 } as const;
    const value = begins.get(name) ?? { out: 0, sizes: [], ragged: 0, fanout: 0, dtype: "f32", leaf, shardAxes: [] };
    begins.set(name, value);
    return value;
  };
  const grad = new Map<Value, Value>(losses.filter((l) => !isCount(l.name)).map((l) => [l.value, begin(l.weight ?? "one")]));
  const parameterGrads = new Map<Value, Value[]>(counted.map((v) => [v, [v.leaf!.updateInput!]]));
  const gradOf = new Map<Value, Value>(counted.map((v) => [v.leaf!.updateInput!, v]));
  const taken = new Map<string, number>(forward.map((n) => [n.id, 1]));
  const back: Node[] = [];

  const unique = (id: string) => {
    const n = (taken.get(id) ?? 0) + 1;
    taken.set(id, n);
    return n === 1 ? id : `${id}${n}`;
  };
  const adopt = (v: Value, from: Node, id?: string) => {
    for (const n of topological([v], seen)) {
      back.push(n);
      // a clone has all of its own
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
    const carried = node.op.gradOutputs?.map((name) => node.outs[node.op.outputs.findIndex((o) => o.name === name)]!) ?? [y];
    const dys = carried.map((v) => {
      const arrived = grad.get(v);
      invariant(arrived !== undefined, `${idOf(v)} is not used: no gradient arrives`);
      return arrived;
    });
    const named = Object.fromEntries(node.op.inputs.map((t, i) => [t.name, node.args[i]!]));
    const sight = Object.fromEntries(Object.entries(named).map(([name, v]) => [name, backwardSees(v)]));
    for (const [name, part] of Object.entries(node.op.grad(sight, { y: backwardSees(y), dy, dys }, node.attrs))) {
      const v = named[name]!;
      if (v.leaf?.kind === "input") continue;
      adopt(part, node);
      const made = part.node !== undefined && part !== dy;
      if (v.leaf) {
        invariant(made, `${node.id}: a parameter's gradient must be made by an op of its own`);
        part.dtype = "f32"; // main gradients
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
  for (const { id } of [...forward, ...back]) invariant(!leaves.has(id), `${id} is the name of an op and of a leaf`);
  const parameters = [...new Set(forward.flatMap((n) => n.args).filter((v) => v.leaf?.kind === "parameter"))];
  for (const p of parameters) invariant(parameterGrads.has(p), `${idOf(p)} has no gradient`);
  return { losses, parameters, order: [...forward, ...back], grad, parameterGrads, gradOf };
}

/**
 * The nodes that the roots are made of and that are not in `seen`, each after its arguments: the order of a depth-first search. The
 * search keeps its own stack, since a chain of nodes is as long as the model has layers.
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

/** The stable name of a value: its leaf's, or its node's with the output where there are many. */
export const idOf = (v: Value): string =>
  v.leaf ? v.leaf.name : v.node!.outs.length > 1 ? `${v.node!.id}.${v.node!.op.outputs[v.out]!.name}` : v.node!.id;

/** Text of a graph before any cut: it reads like the paper. */
export function printGraph({ order }: Graph): string {
  const shape = (v: Value) => `${v.dtype}[${v.ragged ? ["rows", ...v.sizes.slice(v.ragged)].join(",") : v.sizes.join(",")}]`;
  return order
    .map((n) => `${n.backward ? "bwd" : "fwd"} ${n.id} = ${n.op.name}(${n.args.map(idOf).join(", ")}) -> ${n.outs.map(shape).join(", ")}\n`)
    .join("");
}
