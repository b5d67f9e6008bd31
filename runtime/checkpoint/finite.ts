/** Checks weights for NaN and infinity: a run cannot resume from them, and no file may contain them. */
import { Trouble } from "../../schemas/trouble.ts";

/** Returns `values`; throws a Trouble if one is NaN or infinite. `where` names the tensor: "FILE: tensor NAME". */
export function expectFinite(values: Float32Array, where: string, fix: string): Float32Array {
  // an exponent of ones is NaN or an infinity; a loop over words takes a tenth of the time of Number.isFinite
  const words = new Int32Array(values.buffer, values.byteOffset, values.length);
  let wrong = 0;
  for (let i = 0; i < words.length; i++) if ((words[i]! & 0x7f800000) === 0x7f800000) wrong++;
  if (wrong > 0) throw new Trouble(`${where} holds ${wrong} of ${values.length} values that are NaN or infinite`, fix);
  return values;
}
