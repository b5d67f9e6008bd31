/** The error function in double precision. */

/** Beyond it, erf differs from ±1 by less than a rounding. */
const SATURATED = 6;

/**
 * Returns erf(x) = 2/√π · ∫₀ˣ e^(−t²) dt, to a few roundings: 2/√π · e^(−x²) · Σ 2ⁿ·x^(2n+1)/(1·3·…·(2n+1)), whose terms have one sign
 * (Abramowitz and Stegun, 7.1.6).
 */
export function erf(x: number): number {
  if (Math.abs(x) > SATURATED) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; Math.abs(term) > Math.abs(sum) * Number.EPSILON; n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}
