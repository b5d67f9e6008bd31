/**
 * Regrid: the change of tokens between two grids whose strides do not nest. Before, the tokens are sharded over all sub-axes of one grid;
 * after, over all sub-axes of the other. Each rank keeps its tokens, so no data is sent: only the index of a token changes. No program runs
 * this op: `shard` turns it into a reshard.
 */
import { type Grads, op, type Regrid, type Value } from "./op.ts";

/** The T·L tokens of y are the B·S tokens of x; `Node.regrid` gives the only allowed sharding. */
const regrid = op({
  name: "regrid",
  sig: "x[B!,S!,D] -> y[T!,L!,D]",
  cpu({ x, y }) {
    y.set(x);
  },
  grad({ x }, { y, dy }): Grads {
    const { from, to } = y.node!.regrid!;
    return { x: regridded(dy, x.sizes, { from: to, to: from }) };
  },
});

/** Returns the tokens of x as [T,L,…], sharded as in the target grid. */
export function regridded(x: Value, [T, L]: readonly number[], regridAt: Regrid, id = ""): Value {
  const y = regrid.of({ x }, { T: T!, L: L! }, id);
  y.node!.regrid = regridAt;
  return y;
}
