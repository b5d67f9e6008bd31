/** The clock that the power limit of a device leaves its arithmetic units: the more a step computes and moves in a second, the lower it is. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import type { Hardware } from "./hardware.ts";

/** What a rank does in some time: floating-point operations, bytes of its memory. */
export interface Load {
  readonly flops: number;
  readonly bytes: number;
}

/** Returns the clock, as a share of the highest, of a rank that does so much in so many seconds; 1 where the profile has no law of it. */
export function clockOf(
  { power }: DeviceProfile["kernels"],
  { bandwidth, peak }: Hardware,
  { flops, bytes }: Load,
  seconds: number,
): number {
  if (!power || seconds === 0) return 1;
  const share = power.limit - (power.arithmetic * flops) / (seconds * peak.bf16) - (power.memory * bytes) / (seconds * bandwidth);
  return Math.min(1, Math.max(LEAST, share));
}
/** Below this no clock was seen. */
const LEAST = 0.5;

/** Rounds of the search for a clock: a lower one makes a step longer, which leaves more power. */
const ROUNDS = 6;

/** Returns the clock of a step whose seconds depend on it, in thousandths. */
export function settledClock(
  kernels: DeviceProfile["kernels"],
  hardware: Hardware,
  load: Load,
  secondsAt: (clock: number) => number,
): number {
  if (!kernels.power) return 1;
  let clock = 1;
  for (let n = 0; n < ROUNDS; n++) clock = (clock + clockOf(kernels, hardware, load, secondsAt(clock))) / 2;
  return Math.round(1000 * clock) / 1000;
}
