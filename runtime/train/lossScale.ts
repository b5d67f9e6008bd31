/**
 * The scale of the loss in fp16, as Megatron Core's grad scalers keep it. It lives on the host: that a step overflowed is known there
 * with the step's numbers, which all ranks agree on, and a step is told its scale like its learning rate, a replayed one too.
 */
import type { Job } from "../../schemas/job.ts";

/** How far a scale that adapts itself has got: the scale, steps in a row that went well, and overflows until it shrinks. */
export interface ScaleState {
  readonly scale: number;
  readonly well: number;
  readonly patience: number;
}
export interface LossScale {
  /** Of the step to come. */
  value(): number;
  /** A step is over, and its gradients overflowed or did not. */
  done(overflowed: boolean): void;
  /** Steps in a row that overflowed at a scale that cannot shrink, the last one among them; since the process began. */
  hopeless(): number;
  /** Null where it does not adapt. */
  state(): ScaleState | null;
}

/** Beyond it, what divides by it would vanish. Megatron Core's has no end, and never gets there: gradients overflow long before. */
const LARGEST = 2 ** 100;

/**
 * A number stays. A section: after `hysteresis` overflows the scale shrinks, and with every further one, until `growth_interval` steps in
 * a row went well; then it grows, and the count of overflows begins anew. `from`: of the run that this one goes on from; a run whose scale
 * did not adapt has none, and then this begins at `initial`. The job may have changed since, so the limits are applied to it.
 */
export function lossScaleOf(how: NonNullable<Job["train"]["loss_scale"]>, from?: ScaleState | null): LossScale {
  let hopeless = 0;
  if (typeof how === "number")
    return {
      value: () => how,
      done(overflowed) {
        hopeless = overflowed ? hopeless + 1 : 0;
      },
      hopeless: () => hopeless,
      state: () => null,
    };
  const { initial, growth, growth_interval, backoff, hysteresis, min } = how;
  const begin = from ?? { scale: Math.fround(initial), well: 0, patience: hysteresis };
  let { well } = begin;
  let scale = Math.max(begin.scale, min);
  let patience = Math.min(begin.patience, hysteresis);
  return {
    value: () => scale,
    state: () => ({ scale, well, patience }),
    hopeless: () => hopeless,
    done(overflowed) {
      hopeless = overflowed && scale <= min ? hopeless + 1 : 0;
      well = overflowed ? 0 : well + 1;
      if (overflowed && --patience <= 0) scale = Math.max(Math.fround(scale * backoff), min);
      if (well < growth_interval) return;
      well = 0;
      patience = hysteresis;
      scale = Math.min(Math.fround(scale * growth), LARGEST);
    },
  };
}
