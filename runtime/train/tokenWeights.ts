/**
 * From what a step learns: how much the loss at each token counts, and what multi-token prediction sees and predicts. The host
 * knows all labels of a step before anything runs, so that these are inputs of a plan.
 */
import { IGNORED } from "../data/tokens.ts";

export interface Weighting {
  /** Means of what: of each microbatch of one data rank, and over these; or over all tokens of the step. */
  readonly by: "microbatch" | "token";
  /** Tokens of one microbatch of one data rank; those of a step lie one after the other. */
  readonly together: number;
}

/**
 * The weight of the loss at each token: 0 where it is ignored, else such that the weighted sum over a step is the mean. Microbatches
 * count alike however many labels they have, and one that has none counts as a loss of 0, as in Megatron Core, where a context rank's
 * part of a microbatch is averaged by itself: here it is the whole microbatch, so that nothing depends on the mesh. With `token` all
 * labels of a step count alike (its calculate_per_token_loss). `share`: what all weights are multiplied by.
 */
export function weightsOf(labels: Int32Array, { by, together }: Weighting, share = 1): Float32Array {
  const weights = new Float32Array(labels.length);
  const size = by === "token" ? labels.length : together;
  for (let from = 0; from < labels.length; from += size) {
    const group = labels.subarray(from, from + size);
    const each = (share * size) / labels.length / Math.max(1, countOf(group));
    for (const [i, label] of group.entries()) if (label !== IGNORED) weights[from + i] = each;
  }
  return weights;
}
export const countOf = (labels: Int32Array): number => labels.reduce((n, label) => n + Number(label !== IGNORED), 0);

/**
 * What a printed loss is multiplied by, so that it is the mean over the microbatches that have labels: `weightsOf` counts one without
 * labels as a loss of 0, which is right for the gradient. Each element of `depths` has the labels of one loss of the sum; 0 where
 * none has a label.
 */
export function meanOverLearnt(depths: readonly Int32Array[], { by, together }: Weighting): number {
  if (by === "token") return depths.some((labels) => countOf(labels) > 0) ? 1 : 0;
  let [groups, learnt] = [0, 0];
  for (const labels of depths)
    for (let from = 0; from < labels.length; from += together, groups++)
      learnt += Number(countOf(labels.subarray(from, from + together)) > 0);
  return learnt > 0 ? groups / learnt : 0;
}

/** Each sequence moved `by` places ahead; its last places hold `rest`. Megatron Core rolls so: ids end in 0, labels are ignored. */
export function shiftLeft(whole: Int32Array, seq: number, by: number, rest: number): Int32Array {
  const moved = new Int32Array(whole.length).fill(rest);
  for (let row = 0; row < whole.length; row += seq) moved.set(whole.subarray(row + by, row + seq), row);
  return moved;
}
