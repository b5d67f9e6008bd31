/** Random orders that any process computes alike. */
import { keyOf, philox } from "../../src/ops/philox.ts";

/** Fisher-Yates over 0 to length - 1. The draw for place i is a pure function of seed, `name`, epoch and i. */
export function permutation(length: number, seed: number, name: string, epoch: number): Uint32Array<ArrayBuffer> {
  const [k0, k1] = keyOf(seed, name);
  const words = new Uint32Array(4);
  const order = Uint32Array.from({ length }, (_, i) => i);
  for (let i = length - 1; i > 0; i--) {
    philox(words, i, 0, epoch, 0, k0, k1);
    const [high = 0, low = 0] = words;
    // 53 random bits in [0, 1): the bias of an index is at most i / 2^53
    const uniform = (high * 2 ** 21 + (low >>> 11)) * 2 ** -53;
    const j = Math.floor(uniform * (i + 1));
    const [a = 0, b = 0] = [order[i], order[j]];
    order[i] = b;
    order[j] = a;
  }
  return order;
}
