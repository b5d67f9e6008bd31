/** Matrix product of the reference: c += a·b over slices of typed arrays, in double precision, rounded once per block of K when stored. */

/** Elements of K per block: a panel of 4 × 256 doubles is 8 KiB, so that a panel and a strip fit in the L1 cache. */
const BLOCK = 256;

/** Sizes and layout of c[m,n] += a[m,k]·b[k,n]. */
export interface Product {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  /** `a` is stored [k,m] rather than [m,k]. */
  readonly ta?: boolean;
  /** `b` is stored [n,k] rather than [k,n]. */
  readonly tb?: boolean;
  /** Index of the first element of each matrix in its array; default: 0. */
  readonly a0?: number;
  readonly b0?: number;
  readonly c0?: number;
  /** 1: operands are rounded to TF32, 8 bits of exponent and 10 of mantissa, to the nearest, of two equally near the larger. */
  readonly tf32?: number | undefined;
}

/** Adds the product of `a` and `b` to `c`. */
export function gemm(
  c: Float32Array,
  a: Float32Array,
  b: Float32Array,
  { m, n, k, ta = false, tb = false, a0 = 0, b0 = 0, c0 = 0, tf32 = 0 }: Product,
): void {
  const panels = Math.ceil(n / 4);
  const strip = scratch("a", 2 * BLOCK);
  const panel = scratch("b", panels * 4 * BLOCK);
  for (let at = 0; at < k; at += BLOCK) {
    const depth = Math.min(BLOCK, k - at);
    for (let j = 0; j < panels; j++) {
      const lie = tb ? { first: b0 + j * 4 * k + at, lane: k, deep: 1 } : { first: b0 + at * n + j * 4, lane: 1, deep: n };
      pack(panel, j * 4 * depth, b, lie, n - j * 4, 4, depth);
    }
    if (tf32) roundToTf32(panel, panels * 4 * depth);
    for (let i = 0; i < m; i += 2) {
      pack(strip, 0, a, ta ? { first: a0 + at * m + i, lane: 1, deep: m } : { first: a0 + i * k + at, lane: k, deep: 1 }, m - i, 2, depth);
      if (tf32) roundToTf32(strip, 2 * depth);
      for (let j = 0; j < panels; j++) tile(c, c0 + i * n + j * 4, n, strip, panel, j * 4 * depth, depth, m - i, n - j * 4);
    }
  }
}

/** Buffers reused between calls: there is one thread, and products do not nest. */
const kept: Record<string, Float64Array> = {};
function scratch(name: string, length: number): Float64Array {
  const have = kept[name];
  return have && have.length >= length ? have : (kept[name] = new Float64Array(length));
}

const one = new Float32Array(1);
const bits = new Uint32Array(one.buffer);
/** Rounds the first `count` values, which are f32 values, to TF32. */
function roundToTf32(values: Float64Array, count: number): void {
  for (let i = 0; i < count; i++) {
    one[0] = values[i]!;
    if (Number.isFinite(one[0])) bits[0] = (bits[0]! + 0x1000) & 0xffffe000;
    values[i] = one[0];
  }
}

/** Memory layout of a strip: index of its first element, stride between lanes, stride along K. */
interface Lie {
  readonly first: number;
  readonly lane: number;
  readonly deep: number;
}
/** Copies `width` lanes as doubles into a strip, lanes contiguous for each step of K. Lanes beyond `lanes` are zero. */
function pack(
  to: Float64Array,
  at: number,
  from: Float32Array,
  { first, lane, deep }: Lie,
  lanes: number,
  width: 2 | 4,
  depth: number,
): void {
  for (let l = 0; l < width; l++) {
    if (l < lanes) for (let p = 0, i = first + l * lane, o = at + l; p < depth; p++, i += deep, o += width) to[o] = from[i]!;
    else for (let p = 0, o = at + l; p < depth; p++, o += width) to[o] = 0;
  }
}

/** Computes a 2 × 4 tile of c: its sums and operands fit in 16 registers. The product reaches 2.2 to 4.3 GFLOP/s at 256³ and 512³ (Node 20, a shared EPYC core). */
function tile(
  c: Float32Array,
  at: number,
  n: number,
  a: Float64Array,
  b: Float64Array,
  first: number,
  depth: number,
  high: number,
  wide: number,
) {
  // biome-ignore format: one row of the tile per line
  let c00 = 0, c01 = 0, c02 = 0, c03 = 0,
    c10 = 0, c11 = 0, c12 = 0, c13 = 0;
  for (let i = 0, j = first; i < depth * 2; i += 2, j += 4) {
    const a0 = a[i]!;
    const a1 = a[i + 1]!;
    const b0 = b[j]!;
    const b1 = b[j + 1]!;
    const b2 = b[j + 2]!;
    const b3 = b[j + 3]!;
    c00 += a0 * b0;
    c01 += a0 * b1;
    c02 += a0 * b2;
    c03 += a0 * b3;
    c10 += a1 * b0;
    c11 += a1 * b1;
    c12 += a1 * b2;
    c13 += a1 * b3;
  }
  row(c, at, wide, c00, c01, c02, c03);
  if (high > 1) row(c, at + n, wide, c10, c11, c12, c13);
}
function row(c: Float32Array, at: number, wide: number, x0: number, x1: number, x2: number, x3: number): void {
  c[at]! += x0;
  if (wide > 1) c[at + 1]! += x1;
  if (wide > 2) c[at + 2]! += x2;
  if (wide > 3) c[at + 3]! += x3;
}

/** Visits each local expert that has rows, with its first row and its number of rows. Rows are sorted by expert. */
export function runs(rows: Int32Array, first: number, visit: (e: number, row: number, count: number) => void): void {
  const end = rows[0]!;
  for (let r = 0; r < end; ) {
    const e = rows[3 + 3 * r]!;
    const from = r;
    while (r < end && rows[3 + 3 * r] === e) r++;
    visit(e - first, from, r - from);
  }
}
