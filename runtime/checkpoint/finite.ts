/** Checks weights for NaN and infinity: a run cannot resume from them, and no file may contain them. */
import { Trouble } from "../../schemas/trouble.ts";

/** Returns `values`; throws a Trouble if one is NaN or infinite. `where` names the tensor: "FILE: tensor NAME". */
export function expectFinite(values: Float32Array, where: string, fix: string): Float32Array {
  let wrong = 0;
  for (const value of values) if (!Number.isFinite(value)) wrong++;
  if (wrong > 0) throw new Trouble(`${where} holds ${wrong} of ${values.length} values that are NaN or infinite`, fix);
  return values;
}
