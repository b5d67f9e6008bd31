/**
 * The loss scale of fp16, as in Megatron Core's grad scalers. The host updates it: a step's metrics, which all ranks agree on, contain the
 * overflow, and the scale is an input of a step like the learning rate, also of a replayed step.
 */
import type { Job } from "../../schemas/job.ts";

/** The state of a dynamic loss scale: the scale, consecutive steps without overflow, and overflows left until it shrinks. */
export interface ScaleState {
  readonly scale: number;
  readonly well: number;
  readonly patience: number;
}
/** The loss scale of a run. */
export interface LossScale {
  /** Returns the scale of the next step. */
  value(): number;
  /** Updates the scale after a step. */
  done(overflowed: boolean): void;
  /** Returns the consecutive overflows at a scale that cannot shrink, up to the last step; counted from the start of the process. */
  hopeless(): number;
  /** Returns the state; null if the scale is fixed. */
  state(): ScaleState | null;
}

/** Above this bound 1 / scale underflows. Megatron Core has no bound; gradients overflow long before it. */
const LARGEST = 2 ** 100;

/**
 * Returns the loss scale of train.loss_scale. A number is a fixed scale. A dynamic scale shrinks after `hysteresis` overflows and after
 * each further one; after `growth_interval` consecutive steps without overflow it grows, and the overflow count is reset. `from`: the
 * state of the resumed run, or null if its scale was fixed; then the scale starts at `initial`. The limits of the job apply to `from`,
 * because the job may have changed.
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
