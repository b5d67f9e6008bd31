/**
 * Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four 32-bit words as a pure function of a
 * 128-bit counter and a 64-bit key. Random ops of a step use it: a value does not depend on the rank that computes it.
 */

export type Words = [number, number, number, number];

/** Writes the four words of a counter and a key into `out`. */
export function philox(out: Words | Uint32Array, c0: number, c1: number, c2: number, c3: number, k0: number, k1: number): void {
  let [a, b, c, d, key0, key1] = [c0 >>> 0, c1 >>> 0, c2 >>> 0, c3 >>> 0, k0 >>> 0, k1 >>> 0];
  for (let round = 0; round < 10; round++) {
    const high0 = highProduct(0xd2511f53, a);
    const low0 = Math.imul(0xd2511f53, a);
    const high1 = highProduct(0xcd9e8d57, c);
    const low1 = Math.imul(0xcd9e8d57, c);
    a = (high1 ^ b ^ key0) >>> 0;
    b = low1 >>> 0;
    c = (high0 ^ d ^ key1) >>> 0;
    d = low0 >>> 0;
    key0 = (key0 + 0x9e3779b9) >>> 0;
    key1 = (key1 + 0xbb67ae85) >>> 0;
  }
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}

/** Returns the key of a stream, low word first: 64-bit FNV-1a of the seed's 8 little-endian bytes, then of the UTF-8 bytes of the name. */
export function keyOf(seed: number, name: string): readonly [number, number] {
  const seedBytes = new Uint8Array(8);
  new DataView(seedBytes.buffer).setBigInt64(0, BigInt(seed), true);
  let hash = 0xcbf29ce484222325n;
  for (const byte of [...seedBytes, ...new TextEncoder().encode(name)]) hash = BigInt.asUintN(64, (hash ^ BigInt(byte)) * 0x100000001b3n);
  return [Number(hash & 0xffffffffn), Number(hash >> 32n)];
}

/** Returns bits 32 to 63 of a product of two 32-bit words, computed from 16-bit halves so that no partial sum reaches 2^32. */
function highProduct(x: number, y: number): number {
  const xLow = x & 0xffff;
  const xHigh = x >>> 16;
  const yLow = y & 0xffff;
  const yHigh = y >>> 16;
  const middle = xHigh * yLow + ((xLow * yLow) >>> 16);
  const lower = xLow * yHigh + (middle & 0xffff);
  return xHigh * yHigh + (middle >>> 16) + (lower >>> 16);
}
