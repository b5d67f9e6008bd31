/** shardJob: job × mesh → its graph with gradients, on shards. `compile` and the estimate of peak memory begin with it. */
import type { Job } from "../../schemas/job.ts";
import { buildModel } from "../model/model.ts";
import { addBackward } from "./backward.ts";
import type { Mesh } from "./mesh.ts";
import { type Counts, type Trace, untraced } from "./passNames.ts";
import { type Pipeline, pipelineOf, stageOfVirtual, virtualStageAt } from "./pipelineStages.ts";
import { isRecomputed } from "./recompute.ts";
import { type ShardOptions, shard } from "./shard.ts";
import { insertRegrids } from "./sharding/insertRegrids.ts";
import { mergeTied } from "./sharding/mergeTied.ts";
import { shareHeads } from "./sharding/shareHeads.ts";
import type { ShardedGraph } from "./sharding/steps.ts";
import { addUpdates, type TrainingGraph } from "./updateGraph.ts";

/** `pick`: for tests of sharding, as in `ShardOptions`. */
export function shardJob(
  job: Job,
  mesh: Mesh,
  pick: Pick<ShardOptions, "pick"> = {},
  trace: Trace = untraced,
): { readonly graph: TrainingGraph; readonly sharded: ShardedGraph; readonly pipeline: Pipeline } {
  const pipeline = trace("pipeline", () => pipelineOf(job));
  const model = trace("model", () => buildModel(job));
  const placed = insertRegrids(
    shareHeads(
      mergeTied(model, (position) => stageOfVirtual(pipeline, virtualStageAt(pipeline, position))),
      mesh,
    ),
    mesh,
  );
  const graph = trace(
    "graph",
    () => addUpdates(addBackward(placed, isRecomputed(job, pipeline)), job),
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
  return { graph, sharded, pipeline };
}

function countSteps({ steps, deferred, updates }: ShardedGraph): Counts {
  const all = [...steps, ...deferred, ...updates];
  return {
    ops: all.filter(({ kind }) => kind === "compute").length,
    collectives: all.filter(({ kind }) => kind === "collective").length,
  };
}
