/** Dims with fewer elements than the ranks that shard them (`Node.sharing`): key/value heads with more tensor ranks than heads. */
import type { ModelGraph } from "../../model/builder.ts";
import { changed, invariant, type Node, type Sharing, type Value, withArgs } from "../../ops/op.ts";
import { rewriteModel } from "../graphOrder.ts";
import { type Mesh, sizeOfAxis } from "../mesh.ts";

/**
 * Returns a model in which the nodes with `sharing` have as many elements along the dim as ranks, if the mesh has copies: with 2 copies,
 * 4 heads of 6 query heads become 8 groups of 3, and pairs of groups read one head. The attribute named by the axis is the number of
 * copies (`G/copies` in signatures).
 */
export const shareHeads = (model: ModelGraph, mesh: Mesh): ModelGraph =>
  rewriteModel(model, (node, args) => (node.sharing ? shared(node, args, node.sharing, mesh) : withArgs(node, args)));

function shared(node: Node, args: readonly Value[], { dim, inner, axis, within, path }: Sharing, mesh: Mesh): Node {
  const copies = sizeOfAxis(mesh, axis);
  if (copies === 1) return changed(withArgs(node, args), { sharing: undefined });
  const each = node.attrs[inner];
  invariant(each !== undefined && each % copies === 0, () => `${node.id}: ${inner} of ${each} does not divide by ${copies} copies`);
  const refined = withArgs(node, args, { ...node.attrs, [inner]: each / copies, [axis]: copies });
  return changed(refined, { sharing: undefined, pins: [{ dim, axis: within, path }] });
}
