/** The inputs of a plan in one step: the tokens of its batch in the order of the ranks, and its step parameters. */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import type { HostInput, InputSource } from "../../schemas/plan.ts";
import { inputName } from "../../schemas/program.ts";
import { positionOf } from "../../src/ops/positions.ts";
import type { HostData } from "../backend.ts";
import { type Batch, weightingOf } from "./inputs.ts";
import type { StepParameters } from "./stepParameters.ts";
import { countOf, meanOverLearnt } from "./tokenWeights.ts";

/** Permutes the tokens of each sequence into the zigzag order of the context ranks. Inputs of one value are unchanged. */
export function inOrder({ model, parallel: { context } }: Job, given: Batch): Readonly<Record<string, HostData>> {
  if (context === 1) return given;
  const place = Int32Array.from({ length: model.seq }, (_, i) => positionOf(i, model.seq / (2 * context), context));
  const reordered = <T extends HostData>(whole: T) => whole.map((_, i) => whole[i - (i % model.seq) + place[i % model.seq]!]!);
  return Object.fromEntries(Object.entries(given).map(([name, data]) => [name, data.length === 1 ? data : reordered(data)]));
}

/**
 * Returns a function that gives the whole value of an input: the rows of one microbatch of all data ranks, or a number of the step.
 * `given`: the batch after `inOrder`. The function throws if the batch lacks the input.
 */
export function feedOf(
  { model, train, parallel, data }: Job,
  parameters: StepParameters,
  given: Readonly<Record<string, HostData>>,
): (input: HostInput, microbatch: number) => HostData {
  const perMicrobatch = train.micro_batch * parallel.data;
  /** The gradient of the loss with respect to itself, scaled. */
  const begin = parameters.lossScale * parameters.upscale;
  const numbers: Readonly<Partial<Record<InputSource, () => number>>> = {
    one: () => begin,
    mtp_coeff: () => begin * model.mtp!.coeff,
    aux_weight: () => begin * given.aux_weight![0]!,
    lr: () => parameters.lr,
    step: () => parameters.update,
    weight_decay: () => parameters.weightDecay,
    loss_scale: () => parameters.lossScale,
  };
  return (input, m) => {
    const { source } = input;
    const number = numbers[source];
    if (number) return Float32Array.of(number());
    // the number of each sequence since the start of the run; it seeds the random draws
    if (source === "sample") return Int32Array.from({ length: perMicrobatch }, (_, i) => parameters.first + m * perMicrobatch + i);
    if (source === "positions") {
      const { context } = parallel;
      const chunk = context > 1 ? model.seq / (2 * context) : 0;
      // each document that attention is limited to starts at position 0
      const starts = data.documents?.positions ? given.documents?.subarray(m * perMicrobatch * model.seq) : undefined;
      return Int32Array.from(
        { length: perMicrobatch * model.seq },
        (_, i) => positionOf(i % model.seq, chunk, context) - (starts?.[i] ?? 0),
      );
    }
    const whole = given[inputName(input)];
    if (!whole) throw new Error(`rankc: the plan has an input ${inputName(input)}, which the batch lacks`);
    return whole.subarray(m * perMicrobatch * model.seq, (m + 1) * perMicrobatch * model.seq);
  };
}

/** Returns the number of labels of a batch, and the factors of its printed losses (tokenWeights.ts). */
export function learntOf(job: Job, batch: Batch) {
  const weighting = weightingOf(job);
  const ahead = Array.from({ length: depthsOf(job.model) }, (_, k) => batch[`labels_${k + 1}`] as Int32Array);
  return {
    labels: countOf(batch.labels),
    loss: meanOverLearnt([batch.labels], weighting),
    mtp: meanOverLearnt(ahead, weighting),
    depths: ahead.map((labels) => meanOverLearnt([labels], weighting)),
  };
}

/** Returns the share of the pairs of a token and one before it, or itself, that are of one document. `starts`: where each token's document begins. */
export function attentionShare(starts: HostData, seq: number): number {
  let pairs = 0;
  for (let i = 0; i < starts.length; i++) pairs += (i % seq) - (starts[i] ?? 0) + 1;
  return (2 * pairs) / (starts.length * (seq + 1));
}
