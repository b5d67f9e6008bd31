/** Which layers of a job have experts, and how their router balances; apart from the schema of jobs, which is slow to load. */

import type { Balance } from "./job/moe.ts";
import type { Job } from "./job.ts";
import { depthsOf } from "./mtp.ts";

/** Returns whether a layer has experts. */
export function hasExperts({ moe }: Pick<Job["model"], "moe">, layer: number): boolean {
  if (moe === null || moe.layers === "all") return moe !== null;
  if (Array.isArray(moe.layers)) return moe.layers[layer] === 1;
  return layer >= moe.layers.first_dense && layer % moe.layers.every === 0;
}

/** Returns the number of layers with experts, including depths of multi-token prediction, which are of the last layer's kind. */
export function expertLayersOf(model: Pick<Job["model"], "moe" | "mtp" | "layers">): number {
  const own = Array.from({ length: model.layers }, (_, layer) => layer).filter((layer) => hasExperts(model, layer)).length;
  return own + (hasExperts(model, model.layers - 1) ? depthsOf(model) : 0);
}

type Router = NonNullable<Job["model"]["moe"]>["router"];
/** Returns the balancing methods with their weights. Lists of different lengths are cut to the shorter one. */
export function balancesOf({ balance, aux_coeff }: Router): readonly { readonly by: Balance; readonly coeff: number }[] {
  const coeffs = [aux_coeff].flat();
  return [balance].flat().flatMap((by, i) => {
    const coeff = coeffs[i];
    return coeff === undefined ? [] : [{ by, coeff }];
  });
}
/** Returns the balancing method that changes the choice of experts instead of adding a loss; undefined if there is none. */
export const evenBy = ({ balance }: Router): "sinkhorn" | "quantile" | undefined =>
  [balance].flat().find((by): by is "sinkhorn" | "quantile" => by === "sinkhorn" || by === "quantile");
