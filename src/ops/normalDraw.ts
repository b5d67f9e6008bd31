/**
 * Initial weights of a normal distribution, with the same bits on every backend and every mesh. An element is a pure function of the key
 * of its tensor (seed and name) and its index in the whole tensor: a hash of 32 bits gives two elements, 16 bits each, and each half
 * chooses one of 65,536 equally probable values of a table. Devices hash integers and copy words, so no rounding differs between them; all
 * floating-point arithmetic is in the table, which the host makes. Its largest value is 4.32 standard deviations.
 */
import { type Dtype, encoded } from "../../schemas/dtypes.ts";

/** The values of a table: those above 0. The mirror image of each is as probable. */
const TABLE = 2 ** 15;

/** Elements in memory: f32 as words of 32 bits, 16-bit floats as their codes. */
export type ElementWords = Int32Array | Uint16Array;

/**
 * Writes elements `start`, `start + 1`, … of the tensor with this key to `out`. Elements 2q and 2q + 1 are the lower and the upper half of
 * the hash of q. The upper bit of a half is the sign, the others are an index into the table.
 */
export function drawElements(out: ElementWords, table: ElementWords, [key0, key1]: readonly [number, number], start: number): void {
  for (let at = 0; at < out.length; ) {
    const pair = Math.floor((start + at) / 2);
    const [high, low] = [Math.floor(pair / 2 ** 32), pair % 2 ** 32];
    // the high bits of q are constant up to its next multiple of 2^32
    const end = Math.min(out.length, 2 ** 33 * (high + 1) - start);
    const own = [low + key0, key1 + Math.imul(high, 0x9e3779b1), (start + at) % 2] as const;
    if (out instanceof Int32Array) draw32(out.subarray(at, end), table, ...own);
    else draw16(out.subarray(at, end), table, ...own);
    at = end;
  }
}

/**
 * Returns the hash of a pair: triple32 of C. Wellons (hash-prospector, 2018), an exclusive-or with a shift and a product, three times.
 * `low`: the low 32 bits of q plus the first word of the key; `key`: the second word plus a multiple of q's high bits. It is added after the
 * first product, so that tensors with equal sums `low` have different values.
 */
function hashOf(low: number, key: number): number {
  let x = (Math.imul(low ^ (low >>> 17), 0xed5ad4bb) + key) | 0;
  x = Math.imul(x ^ (x >>> 11), 0xac4c1b51);
  x = Math.imul(x ^ (x >>> 15), 0x31848bab);
  return x ^ (x >>> 14);
}

// One loop for each element type: V8 compiles a loop over arrays of two types to code that takes twice as long.
function draw32(out: Int32Array, table: ElementWords, low: number, key: number, odd: number): void {
  let x = low | 0;
  let at = 0;
  if (odd === 1) out[at++] = table[(hashOf(x, key) >>> 16) & 0x7fff]! | (hashOf(x++, key) & 0x80000000);
  for (const last = out.length - 1; at < last; at += 2, x = (x + 1) | 0) {
    const h = hashOf(x, key);
    out[at] = table[h & 0x7fff]! | ((h & 0x8000) << 16);
    out[at + 1] = table[(h >>> 16) & 0x7fff]! | (h & 0x80000000);
  }
  if (at < out.length) out[at] = table[hashOf(x, key) & 0x7fff]! | ((hashOf(x, key) & 0x8000) << 16);
}
function draw16(out: Uint16Array, table: ElementWords, low: number, key: number, odd: number): void {
  let x = low | 0;
  let at = 0;
  if (odd === 1) out[at++] = table[(hashOf(x, key) >>> 16) & 0x7fff]! | ((hashOf(x++, key) >>> 16) & 0x8000);
  for (const last = out.length - 1; at < last; at += 2, x = (x + 1) | 0) {
    const h = hashOf(x, key);
    out[at] = table[h & 0x7fff]! | (h & 0x8000);
    out[at + 1] = table[(h >>> 16) & 0x7fff]! | ((h >>> 16) & 0x8000);
  }
  if (at < out.length) out[at] = table[hashOf(x, key) & 0x7fff]! | (hashOf(x, key) & 0x8000);
}

let unit: Float64Array | undefined;
/** Tables by standard deviation and type; a model has one or two of each. */
const tables = new Map<string, ElementWords>();

/** Returns the table of a standard deviation in the elements of a type: quantiles (j + 1/2) / 65,536 above the median, rounded once from f32. */
export function normalTable(std: number, dtype: Dtype): ElementWords {
  const key = `${std} ${dtype}`;
  const table = tables.get(key) ?? makeTable(std, dtype);
  tables.set(key, table);
  return table;
}

function makeTable(std: number, dtype: Dtype): ElementWords {
  if (!unit) {
    unit = new Float64Array(TABLE);
    for (let j = 0; j < TABLE; j++) unit[j] = upperQuantile((j + 0.5) / 2 ** 16);
  }
  const values = new Float32Array(TABLE);
  for (let j = 0; j < TABLE; j++) values[j] = unit[j]! * std;
  const { words } = encoded(dtype, values);
  if (words instanceof Uint16Array) return words;
  if (words instanceof Float32Array) return new Int32Array(words.buffer);
  throw new Error(`rankc: initial weights are not drawn in ${dtype}`);
}

/** Coefficients of algorithm AS 241 (M. J. Wichura, Applied Statistics 37, 1988, PPND16), ascending: numerator and denominator. */
const central = [
  [
    3.3871328727963665, 133.14166789178438, 1971.5909503065513, 13731.69376550946, 45921.95393154987, 67265.7709270087, 33430.57558358813,
    2509.0809287301227,
  ],
  [
    1, 42.31333070160091, 687.1870074920579, 5394.196021424751, 21213.794301586597, 39307.89580009271, 28729.085735721943,
    5226.495278852854,
  ],
] as const;
const tail = [
  [
    1.4234371107496835, 4.630337846156546, 5.769497221460691, 3.6478483247632045, 1.2704582524523684, 0.2417807251774506,
    0.022723844989269184, 7.745450142783414e-4,
  ],
  [
    1, 2.053191626637759, 1.6763848301838038, 0.6897673349851, 0.14810397642748008, 0.015198666563616457, 5.475938084995345e-4,
    1.0507500716444169e-9,
  ],
] as const;
const ratio = ([above, below]: readonly [readonly number[], readonly number[]], x: number): number =>
  polynomial(above, x) / polynomial(below, x);
function polynomial(coefficients: readonly number[], x: number): number {
  let sum = 0;
  for (let i = coefficients.length - 1; i >= 0; i--) sum = sum * x + coefficients[i]!;
  return sum;
}

/** Returns the normal quantile of 1/2 + d, for d in (0, 1/2) and at least e^-25 below 1/2. Engines differ in logarithms, so it uses its own. */
function upperQuantile(d: number): number {
  return d <= 0.425 ? d * ratio(central, 0.180625 - d * d) : ratio(tail, Math.sqrt(-logarithm(0.5 - d)) - 1.6);
}

/** Returns ln x for x in (0, 1), from 2 artanh((x − 1) / (x + 1)) of x scaled to [1/√2, √2) by a power of 2. */
function logarithm(x: number): number {
  let [scaled, halvings] = [x, 0];
  for (; scaled < Math.SQRT1_2; halvings++) scaled *= 2;
  const z = (scaled - 1) / (scaled + 1);
  let sum = 0;
  for (let k = 21; k >= 1; k -= 2) sum = sum * z * z + 1 / k;
  return 2 * z * sum - halvings * Math.LN2;
}
