/** Chooses the mesh of a new job by rule of thumb: no compiled program, no search. Everything about the choice is behind `chooseMesh`. */
import { type Device, deviceOf } from "../../../schemas/devices.ts";
import { completeJob, type Job, JobText } from "../../../schemas/job.ts";
import { depthsOf } from "../../../schemas/mtp.ts";
import { parameterCount, routedCount } from "../../analysis/parameterCount.ts";
import { jobRules } from "../../rules/jobRules.ts";
import { layoutText } from "../layoutText.ts";

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
  return memoryEstimate(job) * (links === null ? job.parallel.world : 1) <= FILLED * memory;
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
  const layout = pipeline === 1 || (model.layers % parts === 0 && depthsOf(model) === 0) ? undefined : evenLayout(model, parts);
  if (layout === null) return undefined;
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
      ...(layout !== undefined && { layout }),
      ...(expert > 1 && { expert }),
      ...(data > 1 && { distributed_optimizer: true }),
    },
    recompute: mesh.recompute === "selective" ? { mode: "selective", modules } : { mode: mesh.recompute },
    globalBatch: Math.ceil(Math.max(batch, least) / least) * least,
    ...(expert > 1 && { rowsBound: ROWS_BOUND }),
  };
}

/** Spreads the layers with embedding, head and further predictions over parts of a pipeline; null if a part would be empty. */
function evenLayout(model: Job["model"], parts: number): string | null {
  const depths = depthsOf(model);
  const places = model.layers + depths + 2;
  const counts = Array.from({ length: parts }, (_, i) => {
    const share = Math.floor(places / parts) + (i >= 1 && i <= places % parts ? 1 : 0);
    return share - (i === 0 ? 1 : 0) - (i === parts - 1 ? 1 + depths : 0);
  });
  return counts.some((count) => count < 1) ? null : layoutText(counts, depths);
}

/** Returns about how many bytes the fullest rank needs at its peak. */
export function memoryEstimate(job: Job): number {
  const { model, parallel: p, train } = job;
  const bytes = train.precision === "fp32" ? 4 : 2;
  const all = parameterCount(model);
  const routed = routedCount(model);
  const tables = (model.tie_embeddings ? 1 : 2) * model.vocab * model.hidden;
  // weights and gradients stay on every rank that uses them; optimizer state is sharded over the ranks that hold copies
  const held = (count: number, shards: number, copies: number) =>
    (count / shards) * (bytes + 4 + 12 / (p.distributed_optimizer ? copies : 1));
  const stage = 1 / p.pipeline;
  const expertShards = p.expert * p.expert_tensor;
  const state =
    held((all - routed - tables) * stage, p.tensor, p.data) +
    held(tables * (p.pipeline > 1 ? 0.5 : 1), p.tensor, p.data) +
    held(routed * stage, expertShards, (p.world * stage) / expertShards);
  const tokens = (model.seq * train.micro_batch) / (p.tensor * p.context);
  const perLayer = tokens * bytes * activationsOfToken(job);
  // the first stage has a microbatch in flight for each stage, interleaved chunks some more
  const inFlight = (model.layers * stage + 1) * (p.pipeline + (p.virtual_pipeline > 1 ? p.pipeline / p.virtual_pipeline : 0));
  const logits = model.seq * train.micro_batch * (model.vocab / p.tensor) * (bytes + 4);
  const workspace = tokens * bytes * (activationsOfToken(withoutRecompute(job)) + 4 * model.hidden);
  const every = perLayer * (p.pipeline > 1 ? inFlight : model.layers);
  return state + every + Math.max(workspace, logits);
}

const withoutRecompute = (job: Job): Job => ({ ...job, train: { ...job.train, recompute: { ...job.train.recompute, mode: "none" } } });

/** Elements that backward keeps of a token in a layer. */
function activationsOfToken({ model: m, parallel: p, train: { recompute } }: Job): number {
  if (recompute.mode === "full") return m.hidden;
  const isKept = (module: (typeof recompute.modules)[number]) => recompute.mode !== "selective" || !recompute.modules.includes(module);
  const heads = m.mla ? m.heads * (2 * m.head_dim + 2 * m.mla.v_dim) : 2 * (m.heads + m.kv_heads) * m.head_dim;
  const attention = m.mla && !isKept("mla_up_proj") ? m.heads * m.mla.v_dim + 2 * (m.mla.kv_rank + (m.mla.q_rank ?? 0)) : heads;
  const norms = (isKept("layernorm") ? 4 : 2) * m.hidden;
  if (!m.moe) return attention + norms + (isKept("mlp") ? 3 * m.ffn : 0);
  const rows = m.moe.top_k * (p.expert > 1 ? Number(m.moe.rows_bound === "worst" ? p.expert : m.moe.rows_bound) : 1);
  const experts = isKept("moe") ? rows * (2 * m.hidden + 3 * m.moe.ffn) + 3 * (m.moe.shared?.ffn ?? 0) : 0;
  return attention + norms + experts;
}
