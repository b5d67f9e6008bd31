/** From what a step learns: the host knows all labels of a step before anything runs, so that how much each token counts is an input of a plan. */
import { IGNORED } from "./tokens.ts";

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
 * labels of a step count alike (its calculate_per_token_loss).
 */
export function weightsOf(labels: Int32Array, { by, together }: Weighting): Float32Array {
  const weights = new Float32Array(labels.length);
  const size = by === "token" ? labels.length : together;
  for (let from = 0; from < labels.length; from += size) {
    const group = labels.subarray(from, from + size);
    const each = size / labels.length / Math.max(1, countOf(group));
    for (const [i, label] of group.entries()) if (label !== IGNORED) weights[from + i] = each;
  }
  return weights;
}
export const countOf = (labels: Int32Array): number => labels.reduce((n, label) => n + Number(label !== IGNORED), 0);
