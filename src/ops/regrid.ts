/**
 * fold: the seam between two grids whose strides do not nest. The tokens of a value, cut by all factors of one grid, are counted
 * anew, cut by all factors of the other: each rank keeps the tokens it has, and no byte leaves it. On both sides every rank has
 * tokens of its own, so which index a token goes by is the only difference. No program runs this op: `shard` makes a move of it.
 */
import { type Grads, op, type Regrid, type Value } from "./op.ts";

/** T·L tokens are the B·S of x. Neither may be cut but as `Node.fold` says. */
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

/** The same tokens in a shape [T,L,…], as the other grid cuts them. */
export function regridded(x: Value, [T, L]: readonly number[], regridAt: Regrid, id = ""): Value {
  const y = regrid.of({ x }, { T: T!, L: L! }, id);
  y.node!.regrid = regridAt;
  return y;
}
