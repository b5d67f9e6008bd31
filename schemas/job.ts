/**
 * The schema of jobs: names, types, ranges and defaults; each section has a file in schemas/job. `JobText` is the file as written; `Job` is
 * the same with every default filled in. Conditions between keys are rules (src/rules).
 */

import { z } from "zod";
import { Cluster, ClusterText, completeCluster } from "./job/cluster.ts";
import { completeData, Data, DataText } from "./job/data.ts";
import { completeModel, Model, ModelText } from "./job/model.ts";
import { completeParallel, Parallel, ParallelText } from "./job/parallel.ts";
import { completeTrain, Train, TrainText } from "./job/train.ts";

const Code = z.string().regex(/^[A-Z]\d{3}$/, "a code such as C504");
const Allowed = z.strictObject({
  code: Code.describe("code of a warning, such as C504"),
  reason: z.string().min(1).describe("why the job accepts it"),
});

/** The job as written. */
export const JobText = z.strictObject({
  name: z.string().min(1).describe("name of the job in reports"),
  model: ModelText.describe("the transformer"),
  parallel: ParallelText.prefault({}).describe("how the model and the batch are spread over the ranks"),
  train: TrainText.describe("batch, precision and optimizer"),
  data: DataText.describe("the corpus"),
  cluster: ClusterText.prefault({}).describe("hosts and devices"),
  allow: z
    .array(z.union([Code, Allowed]))
    .max(100)
    .optional()
    .describe("warnings that check does not print: codes such as C504, or {code, reason}; errors cannot be allowed"),
});
/** A value of the schema `JobText`. */
export type JobText = z.output<typeof JobText>;

/** The job with every default filled in. The compiler reads it, and the plan contains it. */
export const Job = JobText.omit({ allow: true }).extend({ model: Model, parallel: Parallel, train: Train, data: Data, cluster: Cluster });
/** A value of the schema `Job`. */
export type Job = z.output<typeof Job>;

/** Fills in defaults that depend on other keys. A quotient may be fractional here; a rule reports that before the job is compiled. */
export function completeJob({ allow: _, ...text }: JobText): Job {
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
