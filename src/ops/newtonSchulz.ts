/** Newton–Schulz iterations, which make the singular values of a matrix nearly 1: constants and reference arithmetic. */

/** The number of iterations, and the smallest norm that a matrix is divided by. */
export const newtonSchulz = { iterations: 5, eps: 1e-7 } as const;

/** Coefficients of an iteration X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ. */
export interface Coefficients {
  readonly a: number;
  readonly b: number;
  readonly c: number;
}

/** The names of sets of coefficients, as in Megatron Core; the attribute `coefficients` is an index into this list, 0 by default. */
export const coefficientTypes = ["simple", "quintic"] as const;

const sets: Readonly<Record<(typeof coefficientTypes)[number], readonly Coefficients[]>> = {
  // a steep slope at 0, the same in each iteration (Jordan 2024)
  simple: Array.from({ length: newtonSchulz.iterations }, () => ({ a: 3.4445, b: -4.775, c: 2.0315 })),
  // chosen for each iteration (You 2025), which leaves singular values nearer to 1
  quintic: [
    { a: 4.0848, b: -6.8946, c: 2.927 },
    { a: 3.9505, b: -6.3029, c: 2.6377 },
    { a: 3.7418, b: -5.5913, c: 2.3037 },
    { a: 2.8769, b: -3.1427, c: 1.2046 },
    { a: 2.8366, b: -3.0525, c: 1.2012 },
  ],
};

/** Returns the coefficients of each iteration. `index`: the set, an index into `coefficientTypes`. */
export const coefficientsOf = (index = 0): readonly Coefficients[] => sets[coefficientTypes[index] ?? "simple"];

/** Returns the floating-point operations for one matrix [K,N]. */
export const newtonSchulzFlops = (K: number, N: number): number => {
  const [short, long] = K < N ? [K, N] : [N, K];
  return newtonSchulz.iterations * (4 * short * short * long + 2 * short ** 3);
};

/** Writes the orthogonal form of each of `matrices` matrices [K,N] of `x` to `y`. Arithmetic is in double precision. A matrix of zeros stays one. */
export function orthogonalizeEach(x: Float32Array, y: Float32Array, matrices: number, K: number, N: number, coefficients?: number): void {
  // the Gram matrix is of the shorter dim
  const [short, long] = K < N ? [K, N] : [N, K];
  const place = (i: number, k: number): number => (K < N ? i * N + k : k * N + i);
  for (let e = 0; e < matrices; e++) {
    const from = x.subarray(e * K * N, (e + 1) * K * N);
    const norm = Math.max(Math.sqrt(from.reduce((sum, v) => sum + v * v, 0)), newtonSchulz.eps);
    let now: Float64Array[] = Array.from({ length: short }, (_, i) =>
      Float64Array.from({ length: long }, (_, k) => from[place(i, k)]! / norm),
    );
    for (const each of coefficientsOf(coefficients)) now = iterate(now, each);
    for (const [i, row] of now.entries()) for (const [k, v] of row.entries()) y[e * K * N + place(i, k)] = v;
  }
}
function iterate(rows: readonly Float64Array[], { a, b, c }: Coefficients): Float64Array[] {
  const dot = (p: Float64Array, q: Float64Array): number => {
    let sum = 0;
    for (let k = 0; k < p.length; k++) sum += p[k]! * q[k]!;
    return sum;
  };
  const gram = rows.map((p) => Float64Array.from(rows, (q) => dot(p, q)));
  // A is symmetric: row i of A² is its products with the rows of A
  const factors = gram.map((p) => Float64Array.from(gram, (q, j) => b * p[j]! + c * dot(p, q)));
  return rows.map((row, i) => {
    const next = row.map((v) => a * v);
    for (const [j, other] of rows.entries()) {
      const f = factors[i]![j]!;
      for (let k = 0; k < next.length; k++) next[k]! += f * other[k]!;
    }
    return next;
  });
}
