/** Sharding of a regrid: each rank keeps its tokens, and their numbering changes between the grids. */
import { isDisjointSubAxes } from "../../../schemas/sharding.ts";
import { invariant } from "../../ops/op.ts";
import { type Layout, pairs } from "../layout.ts";
import type { NodeUses, OperandUse } from "./dimChoice.ts";
import type { Placements } from "./placements.ts";

/**
 * Returns the sub-axes of each dim of a regrid node; undefined for any other node. Throws an invariant unless each grid gives every rank
 * of a stage its own block, of the same size in both.
 */
export function regridDims(
  { node, ins: [from], outs: [to] }: NodeUses,
  placements: Placements,
): Map<string, readonly number[]> | undefined {
  const { regrid, id } = node;
  if (!regrid) return undefined;
  invariant(from !== undefined && to !== undefined, `${id}: a regrid has one input and one output`);
  const before = placements.sharding(regrid.from);
  const after = placements.sharding(regrid.to);
  const { mesh } = placements;
  for (const shardedBy of [before, after])
    invariant(
      isDisjointSubAxes(mesh, shardedBy.flat()) && placements.count(shardedBy.flat()) === mesh.per_stage,
      `${id}: two ranks would have the same tokens`,
    );
  const localSizes = ({ value }: OperandUse, shardedBy: Layout["shardedBy"]): number[] =>
    pairs(value.sizes, shardedBy).map(([n, fs]) => n / placements.count(fs));
  for (const [dim, [a, b]] of pairs(localSizes(from, before), localSizes(to, after)).entries())
    invariant(a === b, `${id}: the local size of dim ${dim} differs between the grids`);
  const dims = ({ operand }: OperandUse, shardedBy: Layout["shardedBy"]) =>
    pairs(operand.dimSpecs, shardedBy).map(([s, fs]): [string, readonly number[]] => [s.dim, fs]);
  return new Map([...dims(from, before), ...dims(to, after)]);
}
