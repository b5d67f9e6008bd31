/** Chooses the mesh of a new job as a search does, by its forecast alone: no compiled program. Everything about the choice is behind `chooseMesh`. */
import type { Device } from "../../../schemas/devices.ts";
import { completeJob, type Job, JobText } from "../../../schemas/job.ts";
import { packageProfile } from "../../analysis/estimate/profiles.ts";
import { asInJob, type JobChoice } from "../../search/choice.ts";
import { firstChoice } from "../../search/firstChoice.ts";

/** What a job runs on. */
export interface ClusterChoice {
  readonly gpus: number;
  readonly gpusPerNode: number;
  readonly device: Device;
}

/** The keys that `chooseMesh` decides, as a job writes them. */
export interface MeshChoice {
  readonly parallel: Readonly<Partial<Job["parallel"]>>;
  readonly recompute: Pick<Job["train"]["recompute"], "mode"> & Partial<Pick<Job["train"]["recompute"], "modules">>;
  readonly globalBatch: number;
  /** model.moe.rows_bound; undefined without expert parallelism. */
  readonly rowsBound?: number;
}

/** A job without the keys that `chooseMesh` decides. */
export type JobDraft = Readonly<Record<string, unknown>> & {
  readonly model: Readonly<Record<string, unknown>>;
  readonly train: Readonly<Record<string, unknown>>;
};

/** The share of the device's memory that the forecast may fill: the rest is for what it leaves out. */
const FILLED = 0.85;
/** Sequences that a step has per data rank and stage, so that stages are idle for a small part of it. */
const DEPTH = 4;
/** rows_bound with expert parallelism: memory for all rows that routing can send rarely fits. */
const ROWS_BOUND = 1.5;
/** Orders the meshes of devices without a profile. */
const COMMON = "h100-80gb";

/**
 * Returns the mesh that a search would try first of those that fit by its forecast and break no rule. Undefined if none fits. `batch`: the wanted sequences of
 * a step, which are rounded up to a multiple of what the mesh needs.
 */
export function chooseMesh(draft: JobDraft, cluster: ClusterChoice, batch: number): MeshChoice | undefined {
  const { gpus, gpusPerNode, device } = cluster;
  const profile = packageProfile(device) ?? packageProfile(COMMON);
  if (!profile) return undefined;
  const parsed = completeJob(JobText.parse({ ...draft, parallel: { world: gpus } }));
  const start: Job = {
    ...parsed,
    train: { ...parsed.train, global_batch: gpus },
    cluster: { ...parsed.cluster, gpus_per_node: gpusPerNode, nodes: Math.ceil(gpus / gpusPerNode) },
  };
  const prepared = ({ tensor, pipeline, expert }: JobChoice): Job => {
    const least = (gpus / (tensor * pipeline)) * (pipeline > 1 ? DEPTH * pipeline : 1);
    const { moe } = start.model;
    return {
      ...start,
      model: { ...start.model, moe: moe && { ...moe, ...(expert > 1 && { rows_bound: ROWS_BOUND }) } },
      train: { ...start.train, global_batch: Math.ceil(Math.max(batch, least) / least) * least },
    };
  };
  const found = firstChoice(start, {
    profile,
    fixed: { context: 1, micro_batch: 1, expert_tensor: 1, ...asInJob },
    filled: FILLED,
    prepared,
  });
  return found && choiceOf(found);
}

/** Returns the keys of a job that a mesh decides, without those that have their defaults. */
function choiceOf({ model, parallel, train }: Job): MeshChoice {
  const { world, tensor, sequence, pipeline, virtual_pipeline, layout, expert, data } = parallel;
  const { mode, modules } = train.recompute;
  return {
    parallel: {
      world,
      ...(tensor > 1 && { tensor, sequence }),
      ...(pipeline > 1 && { pipeline }),
      ...(virtual_pipeline > 1 && { virtual_pipeline }),
      ...(layout !== null && { layout }),
      ...(expert > 1 && { expert }),
      ...(data > 1 && { distributed_optimizer: true }),
    },
    recompute: mode === "selective" ? { mode, modules } : { mode },
    globalBatch: train.global_batch,
    ...(expert > 1 && { rowsBound: Number(model.moe?.rows_bound) }),
  };
}

/** Returns a draft with the keys of a choice. */
export const withChoice = (draft: JobDraft, { parallel, recompute, globalBatch, rowsBound }: MeshChoice, cluster: ClusterChoice) => ({
  ...draft,
  model: { ...draft.model, ...(rowsBound !== undefined && { moe: { ...(draft.model.moe as object), rows_bound: rowsBound } }) },
  parallel,
  train: { ...draft.train, global_batch: globalBatch, recompute },
  cluster: { gpus_per_node: cluster.gpusPerNode, device: cluster.device },
});
