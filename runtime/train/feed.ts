/** The inputs of a plan in one step: those of its batch, as they lie over the ranks, and the numbers of its leg of the run. */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { positionOf } from "../../src/ops/positions.ts";
import type { HostData } from "../backend.ts";
import { type Batch, weightingOf } from "./inputs.ts";
import type { StepParameters } from "./schedule.ts";
import { countOf, meanOverLearnt } from "./tokenWeights.ts";

/** Tokens of each sequence in the order in which they lie over the ranks that share it; numbers of a whole step as they are. */
export function inOrder({ model, parallel: { context } }: Job, given: Batch): Readonly<Record<string, HostData>> {
  if (context === 1) return given;
  const place = Int32Array.from({ length: model.seq }, (_, i) => positionOf(i, model.seq / (2 * context), context));
  const laid = <T extends HostData>(whole: T) => whole.map((_, i) => whole[i - (i % model.seq) + place[i % model.seq]!]!);
  return Object.fromEntries(Object.entries(given).map(([name, data]) => [name, data.length === 1 ? data : laid(data)]));
}

/**
 * The whole value of an input by its name, of one microbatch of all data ranks where it has rows, of the step where it is a number.
 * `given`: the batch in order. Throws where the name is no input that a plan can have.
 */
export function feedOf(
  { model, train, parallel }: Job,
  leg: StepParameters,
  given: Readonly<Record<string, HostData>>,
): (name: string, microbatch: number) => HostData {
  const perMicrobatch = train.micro_batch * parallel.data;
  /** What the gradient of a loss begins with. */
  const begin = leg.lossScale * leg.upscale;
  const numbers: Readonly<Record<string, () => number>> = {
    one: () => begin,
    mtp_coeff: () => begin * model.mtp!.coeff,
    aux_weight: () => begin * given.aux_weight![0]!,
    lr: () => leg.lr,
    step: () => leg.update,
    weight_decay: () => leg.weightDecay,
    loss_scale: () => leg.lossScale,
  };
  return (name, m) => {
    const number = numbers[name];
    if (number) return Float32Array.of(number());
    // sequences by their number since the run began: what is random depends on it
    if (name === "sample") return Int32Array.from({ length: perMicrobatch }, (_, i) => leg.first + m * perMicrobatch + i);
    const whole = given[name];
    if (!whole) throw new Error(`rankc: the plan asks for an input ${name}, which this runtime does not know`);
    return whole.subarray(m * perMicrobatch * model.seq, (m + 1) * perMicrobatch * model.seq);
  };
}

/** Labels of a batch, and what its printed losses are multiplied by (learning.ts). */
export function learntOf(job: Job, batch: Batch): { readonly labels: number; readonly loss: number; readonly mtp: number } {
  const weighting = weightingOf(job);
  const ahead = Array.from({ length: depthsOf(job.model) }, (_, k) => batch[`labels_${k + 1}`] as Int32Array);
  return { labels: countOf(batch.labels), loss: meanOverLearnt([batch.labels], weighting), mtp: meanOverLearnt(ahead, weighting) };
}
