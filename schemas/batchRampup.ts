/**
 * Batch-size ramp-up: how many sequences a step has while the batch grows. It grows by the sequences read so far, as Megatron
 * Core's does. Arithmetic over the job, shared by compiler and runtime.
 */
interface Ramp {
  readonly start: number;
  readonly increment: number;
  readonly samples: number;
}
/** `train` of a job. */
interface Growing {
  readonly global_batch: number;
  readonly batch_rampup: Ramp | null;
}

/** Steps in a row that have as many sequences. */
export interface RampupPhase {
  readonly batch: number;
  /** Sequences read before its first step. */
  readonly from: number;
  /** Infinity where the batch has grown up. */
  readonly steps: number;
}

/** Sizes that a batch may go through: each is an order of work of its own, and on CUDA a graph. */
export const MOST_SIZES = 1024;

/** Sequences of the step that begins when `samples` have been read. */
export function batchAt({ global_batch, batch_rampup: ramp }: Growing, samples: number): number {
  if (!ramp || samples > ramp.samples) return global_batch;
  return ramp.start + Math.floor(samples / (ramp.samples / sizesBefore(global_batch, ramp))) * ramp.increment;
}
const sizesBefore = (whole: number, { start, increment }: Ramp): number => (whole - start) / increment;

/** The whole run, phase by phase. A ramp-up that no run can have, which the rules refuse, is taken for none. */
export function phasesOf(train: Growing): RampupPhase[] {
  const { global_batch, batch_rampup: ramp } = train;
  const sizes = ramp ? sizesBefore(global_batch, ramp) : 0;
  const phases: RampupPhase[] = [];
  for (let from = 0; Number.isInteger(sizes) && sizes < MOST_SIZES; ) {
    const batch = batchAt(train, from);
    if (batch >= global_batch) return [...phases, { batch: global_batch, from, steps: Infinity }];
    // the least number of steps after which another size is due; the quotient may be off by its rounding
    const due = (((batch - ramp!.start) / ramp!.increment + 1) * ramp!.samples) / sizes;
    let steps = Math.max(1, Math.ceil((due - from) / batch) - 1);
    while (batchAt(train, from + steps * batch) === batch) steps++;
    phases.push({ batch, from, steps });
    from += steps * batch;
  }
  return [{ batch: global_batch, from: 0, steps: Infinity }];
}

/** Sequences that a run of so many steps reads. */
export function samplesOf(train: Growing, steps: number): number {
  let [left, samples] = [steps, 0];
  for (const { batch, steps: most } of phasesOf(train)) {
    const own = Math.min(left, most);
    samples += own * batch;
    left -= own;
  }
  return samples;
}

/** What the schedules of a run count: its sequences, in steps of whole batches. */
export const lengthOf = (train: Growing & { readonly steps: number }): number => samplesOf(train, train.steps) / train.global_batch;
