/**
 * Batch-size ramp-up: the number of sequences of each step while the batch grows with the sequences read so far, as in Megatron Core.
 * Arithmetic over the job, shared by compiler and runtime.
 */
interface Ramp {
  readonly start: number;
  readonly increment: number;
  readonly samples: number;
}
/** The keys of `train` that decide the batch. */
interface Growing {
  readonly global_batch: number;
  readonly batch_rampup: Ramp | null;
}

/** Consecutive steps with the same number of sequences. */
export interface RampupPhase {
  readonly batch: number;
  /** Sequences read before the first step of the phase. */
  readonly from: number;
  /** The number of steps; Infinity for the phase with the full batch. */
  readonly steps: number;
}

/** The largest number of batch sizes. Each has its own schedule, and on CUDA its own graph. */
export const MOST_SIZES = 1024;

/** Returns the sequences of the step that starts after `samples` sequences. */
export function batchAt({ global_batch, batch_rampup: ramp }: Growing, samples: number): number {
  if (!ramp || samples > ramp.samples) return global_batch;
  return ramp.start + Math.floor(samples / (ramp.samples / sizesBefore(global_batch, ramp))) * ramp.increment;
}
const sizesBefore = (globalBatch: number, { start, increment }: Ramp): number => (globalBatch - start) / increment;

/** Returns the phases of a run. An invalid ramp-up, which a rule reports, counts as none. */
export function phasesOf(train: Growing): RampupPhase[] {
  const { global_batch, batch_rampup: ramp } = train;
  const whole: RampupPhase = { batch: global_batch, from: 0, steps: Infinity };
  if (!ramp) return [whole];
  const sizes = sizesBefore(global_batch, ramp);
  const phases: RampupPhase[] = [];
  for (let from = 0; Number.isInteger(sizes) && sizes < MOST_SIZES; ) {
    const batch = batchAt(train, from);
    if (batch >= global_batch) return [...phases, { ...whole, from }];
    // the smallest number of steps after which the size changes; the quotient may be off by rounding
    const due = (((batch - ramp.start) / ramp.increment + 1) * ramp.samples) / sizes;
    let steps = Math.max(1, Math.ceil((due - from) / batch) - 1);
    while (batchAt(train, from + steps * batch) === batch) steps++;
    phases.push({ batch, from, steps });
    from += steps * batch;
  }
  return [whole];
}

/** Returns the sequences that a run of `steps` steps reads. */
export function samplesOf(train: Growing, steps: number): number {
  let [left, samples] = [steps, 0];
  for (const { batch, steps: most } of phasesOf(train)) {
    const own = Math.min(left, most);
    samples += own * batch;
    left -= own;
  }
  return samples;
}

/** Returns the length of a run for learning-rate schedules: its sequences, in steps of the full batch. */
export const lengthOf = (train: Growing & { readonly steps: number }): number => samplesOf(train, train.steps) / train.global_batch;
