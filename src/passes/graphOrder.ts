/** Orders of the nodes of a graph, and graphs with other nodes. A graph is never changed in place. */
import type { ModelGraph } from "../model/builder.ts";
import { type Node, outputOf, type Value } from "../ops/op.ts";

/**
 * Returns the nodes that the roots depend on and that are not in `seen`, each after its arguments, in depth-first order. Adds them to
 * `seen`. The search keeps an explicit stack, since a chain of nodes grows with the number of layers.
 */
export function topological(roots: readonly Value[], seen = new Set<Node>()): Node[] {
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

/** Returns the nodes of a model, each after its arguments. */
export const nodesOf = ({ losses, updateInputs }: ModelGraph): Node[] =>
  topological([...updateInputs.values(), ...losses.map((l) => l.value)]);

/**
 * Returns a model with other nodes. `rewrite` receives each node after its arguments, with the arguments that replace them; it returns the
 * node that replaces it.
 */
export function rewriteModel(model: ModelGraph, rewrite: (node: Node, args: readonly Value[]) => Node): ModelGraph {
  const rewritten = new Map<Node, Node>();
  const replaced = (v: Value): Value => {
    const node = v.node && rewritten.get(v.node);
    return node ? outputOf(node, v.out) : v;
  };
  for (const node of nodesOf(model)) rewritten.set(node, rewrite(node, node.args.map(replaced)));
  return {
    losses: model.losses.map((loss) => ({ ...loss, value: replaced(loss.value) })),
    updateInputs: new Map([...model.updateInputs].map(([parameter, value]) => [parameter, replaced(value)])),
  };
}
