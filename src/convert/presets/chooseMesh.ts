/** Chooses the mesh of a new job by rule of thumb: no compiled program, no search. Everything about the choice is behind `chooseMesh`. */
import { type Device, deviceOf } from "../../../schemas/devices.ts";
import { completeJob, type Job, JobText } from "../../../schemas/job.ts";
import { evenLayout } from "../../analysis/evenLayout.ts";
import { memoryForecast } from "../../analysis/memoryForecast.ts";
import { jobRules } from "../../rules/jobRules.ts";

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

/** The share of the device's memory that the estimate may fill: the rest is for what it leaves out. */
const FILLED = 0.85;
/** Sequences that a step has per data rank and stage, so that stages are idle for a small part of it. */
const DEPTH = 4;
/** rows_bound with expert parallelism: memory for all rows that routing can send rarely fits. */
const ROWS_BOUND = 1.5;

/**
 * Returns the first mesh by rising cost that breaks no rule and fits the memory by a closed-form estimate; a mesh without warnings goes before one with them.
 * Undefined if none fits. `batch`: the wanted sequences of a step, which are rounded up to a multiple of what the mesh needs.
 */
export function chooseMesh(draft: JobDraft, cluster: ClusterChoice, batch: number): MeshChoice | undefined {
  let warned: MeshChoice | undefined;
  const start = completeJob(JobText.parse({ ...draft, parallel: { world: cluster.gpus } }));
  for (const mesh of meshesByCost(start.model, cluster)) {
    const choice = withBatch(start.model, mesh, cluster, batch);
    const job = choice && jobWith(start, choice, cluster);
    if (!job || !fits(job)) continue;
    const broken = jobRules.flatMap((rule) => ([...rule.check(job)].length > 0 ? [rule.level] : []));
    if (broken.length === 0) return choice;
    if (!broken.includes("error")) warned ??= choice;
  }
  return warned;
}

/** Returns a draft with the keys of a choice. */
export const withChoice = (draft: JobDraft, { parallel, recompute, globalBatch, rowsBound }: MeshChoice, cluster: ClusterChoice) => ({
  ...draft,
  model: { ...draft.model, ...(rowsBound !== undefined && { moe: { ...(draft.model.moe as object), rows_bound: rowsBound } }) },
  parallel,
  train: { ...draft.train, global_batch: globalBatch, recompute },
  cluster: { gpus_per_node: cluster.gpusPerNode, device: cluster.device },
});

/** Returns a job with the keys of a choice, without reading it again: hundreds of choices are compared. */
function jobWith(start: Job, { parallel, recompute, globalBatch, rowsBound }: MeshChoice, { gpus, gpusPerNode }: ClusterChoice): Job {
  const { model, train, cluster } = start;
  const degrees: Job["parallel"] = { ...start.parallel, ...parallel };
  return {
    ...start,
    model: { ...model, moe: model.moe && { ...model.moe, rows_bound: rowsBound ?? model.moe.rows_bound } },
    parallel: { ...degrees, data: gpus / (degrees.tensor * degrees.pipeline) },
    train: { ...train, global_batch: globalBatch, recompute: { ...train.recompute, ...recompute } },
    cluster: { ...cluster, gpus_per_node: gpusPerNode, nodes: Math.ceil(gpus / gpusPerNode) },
  };
}

/** Returns whether the estimate is within the memory of the device; one process has that of all ranks on a device without links. */
function fits(job: Job): boolean {
  const { memory, links } = deviceOf(job.cluster.device);
  return memoryForecast(job) * (links === null ? job.parallel.world : 1) <= FILLED * memory;
}

interface Mesh {
  readonly tensor: number;
  readonly pipeline: number;
  readonly expert: number;
  readonly recompute: "none" | "selective" | "full";
}

/** Returns all meshes that may be considered, cheap ones first: little communication and recomputation, and none of it between nodes. */
function meshesByCost(model: Job["model"], { gpus, gpusPerNode }: ClusterChoice): Mesh[] {
  const powers = (most: number): number[] => Array.from({ length: 12 }, (_, i) => 2 ** i).filter((n) => n <= most && gpus % n === 0);
  const experts = model.moe?.experts;
  const meshes = powers(Math.min(gpusPerNode, 8)).flatMap((tensor) =>
    powers(Math.min(16, model.layers, gpus / tensor)).flatMap((pipeline) =>
      (experts === undefined ? [1] : powers(Math.min(experts, gpus / pipeline))).flatMap((expert) =>
        (["none", "selective", "full"] as const).map((recompute) => ({ tensor, pipeline, expert, recompute })),
      ),
    ),
  );
  const cost = ({ tensor, pipeline, expert, recompute }: Mesh): number =>
    1.5 * Math.log2(tensor) +
    Math.log2(pipeline) +
    0.3 * Math.log2(expert) +
    (expert > gpusPerNode ? 1.5 * Math.log2(expert / gpusPerNode) : 0) +
    { none: 0, selective: 0.8, full: 4 }[recompute];
  return meshes.sort((a, b) => cost(a) - cost(b));
}

/** Returns the keys of a mesh, with chunks, layout and batch; undefined if the layers do not fill the stages. */
function withBatch(model: Job["model"], mesh: Mesh, { gpus }: ClusterChoice, batch: number): MeshChoice | undefined {
  const { tensor, pipeline, expert } = mesh;
  const data = gpus / (tensor * pipeline);
  const chunks = pipeline >= 4 && model.layers / (2 * pipeline) >= 2 ? 2 : 1;
  const parts = pipeline * chunks;
  const layout = evenLayout(model, parts);
  if (layout === undefined) return undefined;
  const least = data * (pipeline > 1 ? DEPTH * pipeline : 1);
  const modules: Job["train"]["recompute"]["modules"] = ["layernorm"];
  if (model.mla) modules.push("mla_up_proj");
  if (model.moe) modules.push("moe");
  if (model.moe?.layers !== "all") modules.push("mlp");
  return {
    parallel: {
      world: gpus,
      ...(tensor > 1 && { tensor, sequence: true }),
      ...(pipeline > 1 && { pipeline }),
      ...(chunks > 1 && { virtual_pipeline: chunks }),
      ...(layout !== null && { layout }),
      ...(expert > 1 && { expert }),
      ...(data > 1 && { distributed_optimizer: true }),
    },
    recompute: mesh.recompute === "selective" ? { mode: "selective", modules } : { mode: mesh.recompute },
    globalBatch: Math.ceil(Math.max(batch, least) / least) * least,
    ...(expert > 1 && { rowsBound: ROWS_BOUND }),
  };
}
