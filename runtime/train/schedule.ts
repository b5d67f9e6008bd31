/**
 * The course of a run: what each step is told (how many sequences it has and which, its learning rate, weight decay and loss scale),
 * and what a step that is over changes about it. All ranks follow it by themselves, and are never apart: it goes by numbers that
 * they agree on.
 */

import { batchAt } from "../../schemas/batchRampup.ts";
import type { Job } from "../../schemas/job.ts";
import { type LossScale, lossScaleOf, type ScaleState } from "./lossScale.ts";
import { learningRate, weightDecay } from "./rates.ts";

export interface StepParameters {
  /** Sequences read before this step. */
  readonly first: number;
  /** Sequences of this step. */
  readonly batch: number;
  readonly microbatches: number;
  /** How often it goes into a whole batch: the plan divides losses, and so gradients, by the size of a whole one, and this makes up for it. */
  readonly upscale: number;
  readonly lr: number;
  readonly weightDecay: number;
  /** What the loss is multiplied by before backward; 1 where nothing is scaled. */
  readonly lossScale: number;
  /** Updates of the weights, this one counted. */
  readonly update: number;
}
/** How far a run is. */
export interface RunProgress {
  /** Steps that are over. */
  readonly steps: number;
  /** Sequences that they read, and of these those whose steps changed weights; and updates of the weights. */
  readonly read: number;
  readonly trained: number;
  readonly updates: number;
  /** Of a scale that adapts itself. */
  readonly loss_scale: ScaleState | null;
}
/** What a step did: it updated the weights, or it was skipped, for gradients that the loss scale made overflow, or for another number that is not finite. */
export type Outcome = "updated" | "overflowed" | "nonfinite";
export interface TrainingSchedule {
  progress(): RunProgress;
  /** The step to come. */
  next(): StepParameters;
  /** It is over. A step that was skipped is no update: schedules and the optimizer's bias correction do not advance by it. */
  done(outcome: Outcome): void;
  /** As of the loss scale: steps in a row that overflowed at the least one. */
  hopeless(): number;
}

/** From its beginning, or from where another run of the job was. */
export function trainingSchedule({ train, parallel }: Pick<Job, "train" | "parallel">, from?: RunProgress): TrainingSchedule {
  const scale: LossScale = lossScaleOf(train.loss_scale !== null && train.precision === "fp16" ? train.loss_scale : 1, from?.loss_scale);
  let { steps, read, trained, updates } = from ?? { steps: 0, read: 0, trained: 0, updates: 0 };
  return {
    progress: () => ({ steps, read, trained, updates, loss_scale: scale.state() }),
    next() {
      const batch = batchAt(train, read);
      return {
        ...{ first: read, batch, microbatches: batch / (train.micro_batch * parallel.data), upscale: train.global_batch / batch },
        ...{ lr: learningRate(train, trained), weightDecay: weightDecay(train, trained), lossScale: scale.value(), update: updates + 1 },
      };
    },
    hopeless: () => scale.hopeless(),
    done(outcome) {
      steps++;
      const batch = batchAt(train, read);
      read += batch;
      if (outcome === "updated") {
        trained += batch;
        updates++;
      }
      // a loss that is not finite says nothing about its scale
      if (outcome !== "nonfinite") scale.done(outcome === "overflowed");
    },
  };
}
