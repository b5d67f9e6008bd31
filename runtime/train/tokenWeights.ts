/**
 * Weights of the token losses, and shifted ids and labels for multi-token prediction. All labels of a step are on the host before it
 * runs, so these values are inputs of the plan.
 */
import { IGNORED } from "../data/tokens.ts";

/** How token losses are averaged. */
export interface Weighting {
  /** The mean over each microbatch of a data rank and then over microbatches, or the mean over all tokens of the step. */
  readonly by: "microbatch" | "token";
  /** Tokens of one microbatch of one data rank; the microbatches of a step are contiguous. */
  readonly together: number;
}

/**
 * Returns the weight of the loss at each token: 0 if the label is ignored; the weighted sum over a step is the mean loss. With
 * `microbatch`, every microbatch has the same weight, and one without labels has the loss 0, as in Megatron Core. Megatron Core averages
 * the part of each context rank; rankc averages the whole microbatch, so that the result does not depend on the mesh. With `token`, all
 * labels of a step have the same weight (calculate_per_token_loss). `share`: a factor of all weights.
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
/** Returns the number of labels that are not ignored. */
export const countOf = (labels: Int32Array): number => labels.reduce((n, label) => n + Number(label !== IGNORED), 0);

/**
 * Returns the factor that turns the loss of `weightsOf` into the mean over microbatches with labels, for printing. `weightsOf` gives a
 * microbatch without labels the loss 0, which is correct for the gradient. Each element of `depths` has the labels of one loss of the
 * sum. Returns 0 if there are no labels.
 */
export function meanOverLearnt(depths: readonly Int32Array[], { by, together }: Weighting): number {
  if (by === "token") return depths.some((labels) => countOf(labels) > 0) ? 1 : 0;
  let [groups, learnt] = [0, 0];
  for (const labels of depths)
    for (let from = 0; from < labels.length; from += together, groups++)
      learnt += Number(countOf(labels.subarray(from, from + together)) > 0);
  return learnt > 0 ? groups / learnt : 0;
}

/** Shifts each sequence left by `by` and fills with `rest`, as Megatron Core does: 0 for ids, ignored for labels. */
export function shiftLeft(whole: Int32Array, seq: number, by: number, rest: number): Int32Array {
  const moved = new Int32Array(whole.length).fill(rest);
  for (let row = 0; row < whole.length; row += seq) moved.set(whole.subarray(row + by, row + seq), row);
  return moved;
}
