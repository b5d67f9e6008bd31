/**
 * A forecast of a choice in closed form: seconds of a step and bytes of a rank. It orders the choices, so that only the most promising are
 * compiled; a choice is excluded by it only where its bytes are far beyond the device.
 */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { hopsOfRows, rowsSent } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { hardwareOf } from "../analysis/estimate/hardware.ts";
import { collectiveSeconds, transferSeconds } from "../analysis/estimate/linkTime.ts";
import type { Assumptions } from "../analysis/estimate/timedBlocks.ts";
import type { GroupTopology } from "../analysis/estimate/topology.ts";
import { memoryForecast } from "../analysis/memoryForecast.ts";
import { modelFlops } from "../analysis/modelFlops.ts";
import { parameterCount, routedCount } from "../analysis/parameterCount.ts";
import { type JobChoice, jobWith } from "./choice.ts";

/** A forecast: seconds of a step, bytes of the rank with the most memory. */
export interface Forecast {
  readonly seconds: number;
  readonly bytes: number;
}

/** What forecasts of all choices of a job share. */
export interface ForecastBase {
  readonly job: Job;
  readonly profile: DeviceProfile;
  /** Parameters of routed experts, and all others. */
  readonly routed: number;
  readonly shared: number;
  readonly flops: number;
  readonly assumed: Assumptions;
  /** Forecast bytes by the keys that they depend on. */
  readonly bytes: Map<string, number>;
}

/** Returns what the forecasts of a job share. */
export function forecastBase(job: Job, profile: DeviceProfile, assumed: Assumptions = {}): ForecastBase {
  const { model } = job;
  const routed = routedCount(model);
  return {
    job,
    profile,
    assumed,
    routed,
    shared: parameterCount(model) - routed,
    flops: modelFlops(model) * job.train.global_batch,
    bytes: new Map(),
  };
}

/** Share of the peak that large products reach, and the rows at which a product reaches half of that. */
const SHARE = 0.6;
const HALF_ROWS = 96;

/** Returns how a group lies on nodes whose ranks are `stride` apart. */
function groupOf(ranks: number, stride: number, perHost: number): GroupTopology {
  const perNode = Math.max(1, Math.min(ranks, Math.floor(perHost / stride)));
  return { ranks, nodes: Math.ceil(ranks / perNode), perNode };
}

/** Returns on how many nodes the groups of a choice are. */
export function nodesOf({ job }: ForecastBase, { tensor, context, expert, expert_tensor }: JobChoice) {
  const nodes = (ranks: number, stride: number): number => groupOf(ranks, stride, job.cluster.gpus_per_node).nodes;
  return { tensor: nodes(tensor, 1), context: nodes(context, tensor), expert: nodes(expert, expert_tensor) };
}

/** Forecasts a choice. */
export function forecast(base: ForecastBase, choice: JobChoice): Forecast {
  const { dispatch: _, gradient_bucket: __, ...held } = choice;
  const key = Object.values(held).join();
  const bytes = base.bytes.get(key) ?? memoryForecast(jobWith(base.job, choice));
  base.bytes.set(key, bytes);
  return { seconds: forecastSeconds(base, choice), bytes };
}

/** Returns whether exchanges of rows run beside the kernels of another microbatch. */
const isInterleaved = ({ parallel }: Job, { expert_overlap: own, expert }: JobChoice): boolean =>
  expert > 1 && (own === "job" ? parallel.expert_overlap : own) === "interleave";

/** Returns the seconds of kernels and exchanges, one after the other or, with what each loses to the other, beside each other. */
function beside(kernels: number, exchanges: number, overlap?: DeviceProfile["overlap"]): number {
  if (!overlap) return kernels + exchanges;
  const longer = exchanges * overlap.collective_factor;
  return Math.max(longer, kernels + overlap.slowdown * Math.min(kernels, longer));
}

/** Forecasts the seconds of a step of a choice. */
export function forecastSeconds(base: ForecastBase, choice: JobChoice): number {
  const { job, profile, flops, assumed } = base;
  const { model, train, parallel, cluster } = job;
  const { tensor, pipeline, virtual_pipeline: chunks, context, expert, expert_tensor, micro_batch, recompute } = choice;
  const { world } = parallel;
  const { links, overlap } = profile;
  /** The share of communication that stays beside what a stack hides. */
  const shown = (what: "experts" | "data" | "tensor"): number => (assumed.hidden?.includes(what) ? 1 - overlap.hidden[what] : 1);
  const data = world / (tensor * context * pipeline);
  const microbatches = train.global_batch / (micro_batch * data);
  const bytes = train.precision === "fp32" ? 4 : 2;
  const layers = model.layers / pipeline;
  const topology = (ranks: number, stride: number) => groupOf(ranks, stride, cluster.gpus_per_node);

  // tokens of a microbatch on a rank, between products
  const tokens = (micro_batch * model.seq) / (context * tensor);
  const rows = model.moe ? tokens * model.moe.top_k : 0;
  const width = model.moe?.latent ?? model.hidden;
  const rowsOfExpert = model.moe ? (rows * expert * expert_tensor) / model.moe.experts : tokens * tensor;
  const share = (SHARE * rowsOfExpert) / (rowsOfExpert + HALF_ROWS) / (1 + 0.04 * Math.log2(tensor));
  const again = { job: 1, none: 1, selective: 1.03, full: 4 / 3 }[recompute];
  const peak = hardwareOf(profile).peak[train.precision === "fp32" ? "f32" : "bf16"];
  const compute = (flops * again) / world / microbatches / (share * peak);

  const dense = tokens * tensor * model.hidden * bytes;
  const ofTensor = (expert_tensor > 1 || !model.moe ? 8 : 4) * collectiveSeconds(links, "all_gather", dense, topology(tensor, 1));
  const moe = model.moe && choice.dispatch !== "job" ? { ...model.moe, dispatch: choice.dispatch } : model.moe;
  const hops = moe
    ? hopsOfRows({ model: { moe }, parallel: { ...parallel, tensor, pipeline, context, expert, expert_tensor }, cluster })
    : [];
  const exchange = hops.reduce((sum, { ranks, stride, rows }) => {
    const copies = moe && assumed.sendsPerNode ? { experts: moe.top_k, rows } : undefined;
    return sum + collectiveSeconds(links, "all_to_all", tokens * rows * width * bytes, topology(ranks, stride), copies);
  }, 0);
  const gathered = moe ? tokens * rowsSent(moe, expert) * width * bytes * expert_tensor : 0;
  const ofExperts = 4 * exchange + 4 * collectiveSeconds(links, "all_gather", gathered, topology(expert_tensor, 1));
  const keys = 2 * tokens * tensor * model.kv_heads * model.head_dim * bytes;
  const ring = context > 1 ? 1.5 * collectiveSeconds(links, "all_gather", (keys * context) / tensor, topology(context, tensor)) : 0;
  const send =
    pipeline > 1 ? 2 * chunks * transferSeconds(links, tokens * model.hidden * bytes, world / pipeline >= cluster.gpus_per_node) : 0;
  const twice = recompute === "full" ? 1.4 : 1;
  const exchanged = layers * shown("experts") * ofExperts * twice;
  const micro =
    beside(compute, exchanged, isInterleaved(job, choice) ? overlap : undefined) +
    layers * (shown("tensor") * ofTensor + ring) * twice +
    send;

  const [ownShared, ownRouted] = [base.shared / (tensor * pipeline), base.routed / (expert * expert_tensor * pipeline)];
  const [replicas, expertReplicas] = [data * context, world / (pipeline * expert * expert_tensor)];
  const reduce = (count: number, ranks: number, stride: number): number =>
    collectiveSeconds(links, "reduce_scatter", 4 * count, topology(ranks, stride)) +
    collectiveSeconds(links, "all_gather", bytes * count, topology(ranks, stride));
  const step = reduce(ownShared, replicas, tensor) + reduce(ownRouted, expertReplicas, expert * expert_tensor);
  return micro * (microbatches + (pipeline - 1) / chunks) + shown("data") * step;
}
