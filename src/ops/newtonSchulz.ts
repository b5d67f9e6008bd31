/** Newton–Schulz iterations, which make the singular values of a matrix nearly 1: constants and reference arithmetic. */

/** Coefficients of the quintic iteration X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ, chosen for a steep slope at 0 (Jordan 2024). */
export const newtonSchulz = { a: 3.4445, b: -4.775, c: 2.0315, iterations: 5, eps: 1e-7 } as const;
/** Returns the floating-point operations for one matrix [K,N]. */
export const newtonSchulzFlops = (K: number, N: number): number => {
  const [short, long] = K < N ? [K, N] : [N, K];
  return newtonSchulz.iterations * (4 * short * short * long + 2 * short ** 3);
};

/** Writes the orthogonal form of each of `matrices` matrices [K,N] of `x` to `y`. Arithmetic is in double precision. A matrix of zeros stays one. */
export function orthogonalizeEach(x: Float32Array, y: Float32Array, matrices: number, K: number, N: number): void {
  // the Gram matrix is of the shorter dim
  const [short, long] = K < N ? [K, N] : [N, K];
  const place = (i: number, k: number): number => (K < N ? i * N + k : k * N + i);
  for (let e = 0; e < matrices; e++) {
    const from = x.subarray(e * K * N, (e + 1) * K * N);
    const norm = Math.max(Math.sqrt(from.reduce((sum, v) => sum + v * v, 0)), newtonSchulz.eps);
    let now: Float64Array[] = Array.from({ length: short }, (_, i) =>
      Float64Array.from({ length: long }, (_, k) => from[place(i, k)]! / norm),
    );
    for (let i = 0; i < newtonSchulz.iterations; i++) now = iterate(now);
    for (const [i, row] of now.entries()) for (const [k, v] of row.entries()) y[e * K * N + place(i, k)] = v;
  }
}
function iterate(rows: readonly Float64Array[]): Float64Array[] {
  const { a, b, c } = newtonSchulz;
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
