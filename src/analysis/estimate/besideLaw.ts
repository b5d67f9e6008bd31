/** How kernels and collectives slow each other, by the multiprocessors that the collectives may occupy. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";

/** What running at the same time costs. */
export interface Beside {
  /** The share of its rate that a kernel loses. */
  readonly slowdown: number;
  /** How many times as long as alone a collective takes. */
  readonly collective_factor: number;
}

/**
 * Returns what a profile says about collectives that are limited to so many multiprocessors: interpolated between its `limits` over the logarithm of
 * the number. With fewer than the first of them, a collective takes longer in proportion; without a limit, or without `limits`, the values of the
 * profile hold.
 */
export function besideOf(
  { slowdown, collective_factor, limits }: Pick<DeviceProfile["overlap"], "slowdown" | "collective_factor" | "limits">,
  multiprocessors: number | "none",
): Beside {
  const unlimited = { slowdown, collective_factor };
  if (multiprocessors === "none") return unlimited;
  let before: (typeof limits)[number] | undefined;
  for (const limit of limits) {
    if (limit.multiprocessors >= multiprocessors) {
      if (!before) {
        const factor = limit.collective_factor * (limit.multiprocessors / multiprocessors);
        return { slowdown: limit.slowdown, collective_factor: factor };
      }
      const share = Math.log(multiprocessors / before.multiprocessors) / Math.log(limit.multiprocessors / before.multiprocessors);
      const between = (from: number, to: number): number => from + (to - from) * share;
      return {
        slowdown: between(before.slowdown, limit.slowdown),
        collective_factor: between(before.collective_factor, limit.collective_factor),
      };
    }
    before = limit;
  }
  return unlimited;
}
