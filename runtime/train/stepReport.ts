/** The result of a step: its numbers as they are printed and logged. */
import type { Job } from "../../schemas/job.ts";
import { hasTokenWeights } from "../../schemas/lossWeights.ts";
import type { StepResult } from "../../schemas/stepResult.ts";
import { attentionShare, learntOf } from "./feed.ts";
import { reported, type StepNumbers } from "./metrics.ts";
import { type Nonfinite, nonfiniteText } from "./nonfinite.ts";
import type { StepOrder } from "./stepIssuer.ts";

/** The numbers and measurements of a step that has ended. */
export interface EndedStep {
  /** The number of the step, from 1. */
  readonly step: number;
  readonly numbers: StepNumbers;
  readonly seconds: number;
  /** Upper bound of the time that the device waited for the batch, in ms. */
  readonly waitedMs: number;
  /** Bytes in use on the device. */
  readonly memory: number | undefined;
  readonly isSkipped: boolean;
  readonly nonfinite: Nonfinite | undefined;
}

/** Returns the result of a step that has ended. */
export function resultOf(job: Job, { parameters, batch, detailed }: StepOrder, ended: EndedStep): StepResult {
  const { model, train, data } = job;
  const { step, numbers, memory, nonfinite } = ended;
  const learnt = hasTokenWeights(job) ? learntOf(job, batch) : undefined;
  const isFp16 = train.precision === "fp16";
  return {
    step,
    ...reported(numbers, {
      upscale: parameters.upscale,
      aux: batch.aux_weight?.[0] ?? 1,
      loss: learnt?.loss ?? 1,
      mtp: learnt?.mtp ?? 1,
      depths: learnt?.depths,
    }),
    ...(learnt && { labels: learnt.labels }),
    lr: parameters.lr,
    tokens: parameters.batch * model.seq,
    seconds: ended.seconds,
    data_wait_seconds: ended.waitedMs / 1000,
    ...(memory !== undefined && { memory_bytes: memory }),
    ...(detailed && data.documents?.mask && batch.documents && { attention_share: attentionShare(batch.documents, model.seq) }),
    ...(isFp16 && { loss_scale: parameters.lossScale }),
    ...((isFp16 || train.on_nonfinite === "skip") && { skipped: ended.isSkipped }),
    ...(nonfinite && { nonfinite: nonfiniteText(nonfinite) }),
  };
}
