/** shardJob: job × mesh → its graph with gradients, on shards. `compile` and the estimate of peak memory begin with it. */
import type { Job } from "../../schemas/job.ts";
import { buildModel } from "../model/model.ts";
import { addBackward } from "./backward.ts";
import type { Mesh } from "./mesh.ts";
import { type Pipeline, pipelineOf, stageOfVirtual } from "./pipeline.ts";
import { isRecomputed } from "./recompute.ts";
import { type ShardOptions, shard } from "./shard.ts";
import type { ShardedGraph } from "./sharding/steps.ts";
import { addUpdates, type TrainingGraph } from "./updateGraph.ts";

/** `pick`: for tests of sharding, as in `ShardOptions`. */
export function shardJob(
  job: Job,
  mesh: Mesh,
  pick: Pick<ShardOptions, "pick"> = {},
): { readonly graph: TrainingGraph; readonly sharded: ShardedGraph; readonly pipeline: Pipeline } {
  const pipeline = pipelineOf(job);
  const graph = addUpdates(addBackward(buildModel(job), isRecomputed(job, pipeline)), job);
  const sharded = shard(graph, mesh, {
    distributedOptimizer: job.parallel.distributed_optimizer,
    shares: (f) => mesh.subAxes[f]!.stride < mesh.per_stage / job.parallel.optimizer_instances,
    stageOf: (position) => pipeline.of[position]!,
    roleOf: (virtual) => stageOfVirtual(pipeline, virtual),
    ...pick,
  });
  return { graph, sharded, pipeline };
}
