/** shardJob: job × mesh → its graph with gradients, on shards. `compile` and the estimate of peak memory begin with it. */

import { mostHeldOut } from "../../schemas/heldOut.ts";
import type { Job } from "../../schemas/job.ts";
import type { ModelGraph } from "../model/builder.ts";
import { buildEvaluation, buildModel } from "../model/model.ts";
import { addBackward } from "./backward.ts";
import { evaluationGraph } from "./evaluationGraph.ts";
import type { Mesh } from "./mesh.ts";
import { type Counts, type Trace, untraced } from "./passNames.ts";
import { type Pipeline, pipelineOf, stageOfVirtual, virtualStageAt } from "./pipelineStages.ts";
import { isRecomputed } from "./recompute.ts";
import { type ShardOptions, shard } from "./shard.ts";
import { insertRegrids } from "./sharding/insertRegrids.ts";
import { mergeTied } from "./sharding/mergeTied.ts";
import { shareHeads } from "./sharding/shareHeads.ts";
import type { ShardedGraph } from "./sharding/steps.ts";
import { addUpdates, gradientTypeOf, type TrainingGraph } from "./updateGraph.ts";

/** A graph and the same on shards. */
export interface ShardedModel {
  readonly graph: TrainingGraph;
  readonly sharded: ShardedGraph;
}
/** The sharded step of a job, and the forward pass of its evaluations. */
export interface ShardedJob extends ShardedModel {
  readonly pipeline: Pipeline;
  readonly evaluation?: ShardedModel;
}

/** `pick`: for tests of sharding, as in `ShardOptions`. */
export function shardJob(job: Job, mesh: Mesh, pick: Pick<ShardOptions, "pick"> = {}, trace: Trace = untraced): ShardedJob {
  const pipeline = trace("pipeline", () => pipelineOf(job));
  const model = trace("model", () => buildModel(job));
  const placed = (whole: ModelGraph): ModelGraph =>
    insertRegrids(
      shareHeads(
        mergeTied(whole, (position) => stageOfVirtual(pipeline, virtualStageAt(pipeline, position))),
        mesh,
      ),
      mesh,
    );
  const graph = trace(
    "graph",
    () =>
      addUpdates(
        addBackward(placed(model), { isRecomputed: isRecomputed(job, pipeline), gradientType: (p) => gradientTypeOf(p, job.train) }),
        job,
      ),
    ({ order }) => ({ ops: order.length }),
  );
  const instance = mesh.per_stage / job.parallel.optimizer_instances;
  const withinInstance = new Set(mesh.subAxes.flatMap(({ stride }, f) => (stride < instance ? [f] : [])));
  const options: ShardOptions = {
    distributedOptimizer: job.parallel.distributed_optimizer,
    shares: (f) => withinInstance.has(f),
    stageOf: (position) => virtualStageAt(pipeline, position),
    roleOf: (virtual) => stageOfVirtual(pipeline, virtual),
    ...pick,
  };
  const sharded = trace("sharded", () => shard(graph, mesh, options), countSteps);
  if (job.train.evaluation === null) return { graph, sharded, pipeline };
  const forward = evaluationGraph(placed(buildEvaluation(job, mostHeldOut(job.data))));
  return { graph, sharded, pipeline, evaluation: { graph: forward, sharded: shard(forward, mesh, options) } };
}

function countSteps({ steps, deferred, updates }: ShardedGraph): Counts {
  const all = [...steps, ...deferred, ...updates];
  return {
    ops: all.filter(({ kind }) => kind === "compute").length,
    collectives: all.filter(({ kind }) => kind === "collective").length,
  };
}
