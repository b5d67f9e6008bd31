/**
 * Regrid: the change of tokens between two grids whose strides do not nest. Before, the tokens are sharded over all sub-axes of one grid;
 * after, over all sub-axes of the other. Each rank keeps its tokens, so no data is sent: only the index of a token changes. No program runs
 * this op: `shard` turns it into a reshard.
 */
import { declared, type Grads, invariant, op, type Regrid, type Value } from "./op.ts";

/** The T·L tokens of y are the B·S tokens of x; `Node.regrid` gives the only allowed sharding. */
const regrid = op({
  name: "regrid",
  sig: "x[B!,S!,D] -> y[T!,L!,D]",
  cpu({ x, y }) {
    y.set(x);
  },
  grad({ x }, { y, dy }): Grads {
    const [B, S] = x.sizes;
    const grids = y.node?.regrid;
    invariant(grids !== undefined && B !== undefined && S !== undefined, "a regrid has its grids, and tokens of two dims");
    return { x: regridded(dy, [B, S], { from: grids.to, to: grids.from }) };
  },
});

/** Returns the tokens of x as [T,L,…], sharded as in the target grid. */
export function regridded(x: Value, [T, L]: readonly [number, number], regridAt: Regrid, id = ""): Value {
  return declared(regrid.of({ x }, { T, L }, id), { regrid: regridAt });
}
