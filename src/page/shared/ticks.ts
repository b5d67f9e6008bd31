/** Round numbers for the axes of charts. */

/** The values of an axis, evenly apart by `step`, from `from` to `to`. */
export interface Ticks {
  readonly values: readonly number[];
  readonly step: number;
  readonly from: number;
  readonly to: number;
}

/** Returns about `wanted` round values that reach from at most `low` to at least `high`. */
export function ticks(low: number, high: number, wanted: number): Ticks {
  const span = high - low || 1;
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((m) => m * power >= rough) ?? 10);
  const first = Math.floor(low / step);
  const last = Math.max(first + 1, Math.ceil(high / step));
  const values = Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
  return { values, step, from: first * step, to: last * step };
}
