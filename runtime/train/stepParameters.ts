/**
 * The training schedule: batch, learning rate, weight decay and loss scale of each step, and the run progress after it. Every rank
 * computes it without communication; all ranks agree, because it depends only on the job and on reduced metrics.
 */

import { batchAt } from "../../schemas/batchRampup.ts";
import type { Job } from "../../schemas/job.ts";
import { learningRate, weightDecay } from "./learningRate.ts";
import { type LossScale, lossScaleOf, type ScaleState } from "./lossScale.ts";

/** The parameters of one step. */
export interface StepParameters {
  /** Sequences read before this step. */
  readonly first: number;
  /** Sequences of this step. */
  readonly batch: number;
  readonly microbatches: number;
  /** global_batch / batch. The plan divides losses by global_batch; this factor corrects the losses and gradients of a smaller batch. */
  readonly upscale: number;
  readonly lr: number;
  readonly weightDecay: number;
  /** The factor of the loss before the backward pass; 1 without loss scaling. */
  readonly lossScale: number;
  /** Weight updates so far, including this step. */
  readonly update: number;
}
/** The run progress. */
export interface RunProgress {
  /** Completed steps. */
  readonly steps: number;
  /** Sequences read; sequences of steps that changed the weights; weight updates. */
  readonly read: number;
  readonly trained: number;
  readonly updates: number;
  /** The state of a dynamic loss scale; null if the scale is fixed. */
  readonly loss_scale: ScaleState | null;
}
/** The outcome of a step: it updated the weights, or it was skipped because of an fp16 gradient overflow or another non-finite number. */
export type Outcome = "updated" | "overflowed" | "nonfinite";
/** The schedule of a run, advanced step by step. */
export interface TrainingSchedule {
  progress(): RunProgress;
  /** Returns the parameters of the next step. */
  next(): StepParameters;
  /** Returns the parameters of the step after the next, if the next updates the weights, and no loss scale depends on it. */
  following(): StepParameters;
  /** Completes the step. A skipped step does not advance the learning rate, the weight decay or the bias correction. */
  done(outcome: Outcome): void;
  /** Reads over the data of the next step, which trains nothing. */
  skip(): void;
  /** Returns the consecutive overflows at the smallest loss scale. */
  hopeless(): number;
}

/** Returns the training schedule of a job, from step 0 or from the progress of a resumed run. */
export function trainingSchedule({ train, parallel }: Pick<Job, "train" | "parallel">, from?: RunProgress): TrainingSchedule {
  const scale: LossScale = lossScaleOf(train.loss_scale !== null && train.precision === "fp16" ? train.loss_scale : 1, from?.loss_scale);
  let { steps, read, trained, updates } = from ?? { steps: 0, read: 0, trained: 0, updates: 0 };
  /** The parameters of a step after so many sequences read, sequences trained, and updates. */
  const parametersAt = (first: number, learnt: number, before: number): StepParameters => {
    const batch = batchAt(train, first);
    return {
      ...{ first, batch, microbatches: batch / (train.micro_batch * parallel.data), upscale: train.global_batch / batch },
      ...{ lr: learningRate(train, learnt), weightDecay: weightDecay(train, learnt), lossScale: scale.value(), update: before + 1 },
    };
  };
  return {
    progress: () => ({ steps, read, trained, updates, loss_scale: scale.state() }),
    next: () => parametersAt(read, trained, updates),
    following() {
      const batch = batchAt(train, read);
      return parametersAt(read + batch, trained + batch, updates + 1);
    },
    hopeless: () => scale.hopeless(),
    skip() {
      steps++;
      read += batchAt(train, read);
    },
    done(outcome) {
      steps++;
      const batch = batchAt(train, read);
      read += batch;
      if (outcome === "updated") {
        trained += batch;
        updates++;
      }
      // a non-finite loss is not an overflow of the scaled gradients
      if (outcome !== "nonfinite") scale.done(outcome === "overflowed");
    },
  };
}
