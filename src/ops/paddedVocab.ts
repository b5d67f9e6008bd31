/**
 * Columns of logits that belong to ids. The optional attribute `ids` of the ops of the loss is the number of ids; further columns fill V up
 * to a multiple, take no part in the softmax and have no gradient.
 */
import { column, type Expr, exp, greater, rowSum, select, sub } from "./formula.ts";
import type { Attrs } from "./op.ts";

/** Below any logit, and finite. */
export const LOWEST = -3.4028234663852886e38;

/** Returns `value` in the columns of ids, and `filler` in the others. */
export const ofIds = ({ ids }: Attrs, value: Expr, filler: number): Expr =>
  ids === undefined ? value : select(greater(ids, column), value, filler);

/** Returns the sum of exp(x − m) over the columns of ids. */
export const sumOfIds = (x: Expr, m: Expr, attrs: Attrs): Expr => rowSum("sum", ofIds(attrs, exp(sub(x, m)), 0));

/** Returns how many of the `V` columns of a shard that begins at column `start` belong to ids. */
export const idColumns = ({ ids = Number.POSITIVE_INFINITY }: Attrs, V: number, start: number): number =>
  Math.max(0, Math.min(V, ids - start));
