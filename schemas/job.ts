/**
 * The schema of jobs: names, types, ranges and defaults; each section has a file in schemas/job. `JobText` is the file as written; `Job` is
 * the same with every default filled in. Conditions between keys are rules (src/rules).
 */

import { z } from "zod";
import { Cluster, ClusterText, completeCluster } from "./job/cluster.ts";
import { completeData, Data, DataText } from "./job/data.ts";
import { completeModel, Model, ModelText } from "./job/model.ts";
import type { Balance } from "./job/moe.ts";
import { completeParallel, Parallel, ParallelText } from "./job/parallel.ts";
import { completeTrain, Train, TrainText } from "./job/train.ts";
import { depthsOf } from "./mtp.ts";

export { type GatedActivation, isGated, type PlainActivation } from "./job/model.ts";

/** The job as written. */
export const JobText = z.strictObject({
  name: z.string().min(1).describe("name of the job in reports"),
  model: ModelText.describe("the transformer"),
  parallel: ParallelText.prefault({}).describe("how the model and the batch are spread over the ranks"),
  train: TrainText.describe("batch, precision and optimizer"),
  data: DataText.describe("the corpus"),
  cluster: ClusterText.prefault({}).describe("hosts and devices"),
});
export type JobText = z.output<typeof JobText>;

/** The job with every default filled in. The compiler reads it, and the plan contains it. */
export const Job = JobText.extend({ model: Model, parallel: Parallel, train: Train, data: Data, cluster: Cluster });
export type Job = z.output<typeof Job>;

/** Fills in defaults that depend on other keys. A quotient may be fractional here; a rule reports that before the job is compiled. */
export function completeJob(text: JobText): Job {
  const parallel = completeParallel(text.parallel);
  return {
    ...text,
    model: completeModel(text.model),
    parallel,
    train: completeTrain(text.train, parallel.data),
    data: completeData(text.data, text.model.vocab),
    cluster: completeCluster(text.cluster, parallel.world),
  };
}

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

/** Returns the JSON Schema of a job file, for editors. */
export function jobSchema(): Record<string, unknown> {
  return { title: "rankc job", ...z.toJSONSchema(JobText, { target: "draft-07", io: "input" }) };
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
