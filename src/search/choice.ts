/** The choices of a search: how a model is spread over ranks, and what of the batch and of recomputation goes with it. */

import { hasTwoHops, nodesOfExperts } from "../../schemas/experts.ts";
import { type AutoKey, autoNames } from "../../schemas/job/autoKeys.ts";
import { completeParallel } from "../../schemas/job/parallel.ts";
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { evenLayout } from "../analysis/evenLayout.ts";

/** Keys beside the mesh that a search decides, with what it tries; a job may not leave them as `auto`. */
export const sideChoices = {
  /** How rows reach the ranks of their experts. */
  dispatch: ["all_to_all", "once", "once_per_node"],
  /** What runs beside exchanges of rows. */
  expert_overlap: ["none", "shared", "interleave"],
  /** The order of microbatches on a stage. */
  schedule: ["1f1b", "zero_bubble"],
  /** MiB of gradients, and of parameters, that are exchanged beside kernels; one value. */
  gradient_bucket: ["none", 128],
  /** Rows that a rank has room for, over the balanced load: a lower bound is tried where a choice does not fit otherwise. */
  rows_bound: [1.5],
} as const;
/** The name of such a key. */
export type SideKey = keyof typeof sideChoices;
/** The names of all of them. */
export const sideKeys = Object.keys(sideChoices) as readonly SideKey[];

/** The keys that a search decides, with short names for tables. */
export const searchedKeys: readonly SearchedKey[] = [...autoNames, ...sideKeys];
/** The name of a key that a search decides. */
export type SearchedKey = AutoKey | SideKey;

/** Values of recompute that a search tries: as the job has it, nothing, the norms and activations of experts, or whole layers. */
export const recomputeChoices = ["job", "none", "selective", "full"] as const;
/** A value of recompute. */
export type RecomputeChoice = (typeof recomputeChoices)[number];

/** The values of the keys beside the mesh; `job`: as the job has it. */
export interface SideValues {
  readonly dispatch: "job" | (typeof sideChoices)["dispatch"][number];
  readonly expert_overlap: "job" | (typeof sideChoices)["expert_overlap"][number];
  readonly schedule: "job" | (typeof sideChoices)["schedule"][number];
  readonly gradient_bucket: "job" | "none" | number;
  readonly rows_bound: "job" | number;
}
/** All as the job has them. */
export const asInJob: SideValues = { dispatch: "job", expert_overlap: "job", schedule: "job", gradient_bucket: "job", rows_bound: "job" };

/** One way to run a job. */
export interface JobChoice extends Readonly<Record<Exclude<AutoKey, "recompute">, number>>, SideValues {
  readonly recompute: RecomputeChoice;
}

/** Keys whose values are given. */
export type FixedKeys = Partial<Record<AutoKey, number | RecomputeChoice>> & Partial<SideValues>;

/** Largest values that are tried: tensor ranks beyond a node and deeper pipelines are outside of what models of today use. */
const MOST = { pipeline: 64, virtual: 8, context: 16, microBatch: 4 } as const;

const divisors = (n: number, most: number): number[] => {
  const found: number[] = [];
  for (let d = 1; d <= Math.min(n, most); d++) if (n % d === 0) found.push(d);
  return found;
};
/** The powers of two up to `most`: the divisors of the largest. */
const powers = (most: number): number[] => divisors(2 ** Math.floor(Math.log2(Math.max(1, most))), most);

/**
 * Lists the choices whose sizes divide, for the ranks of the job. `fixed` limits keys to one value. Of the keys beside the mesh it varies those that
 * decide over which ranks experts are best spread; `variantsOf` has the others.
 */
export function* choicesOf(job: Job, fixed: FixedKeys): Generator<JobChoice> {
  const { model, parallel, train, cluster } = job;
  const { world } = parallel;
  const only = <T extends number | string>(key: AutoKey, values: readonly T[]): readonly T[] => {
    const value = fixed[key];
    return value === undefined ? values : [value as T];
  };
  const places = model.layers + depthsOf(model) + 2;
  const recomputes = only<RecomputeChoice>("recompute", distinctRecomputes(job));
  for (const tensor of only(
    "tensor",
    divisors(model.heads, cluster.gpus_per_node).filter((t) => world % t === 0),
  ))
    for (const context of only("context", powers(Math.min(MOST.context, world / tensor))))
      for (const pipeline of only("pipeline", divisors(world / (tensor * context), Math.min(MOST.pipeline, places)))) {
        const data = world / (tensor * context * pipeline);
        if (!Number.isInteger(data)) continue;
        const stage = world / pipeline;
        for (const virtual_pipeline of only("virtual_pipeline", virtualChoices(places, pipeline)))
          for (const [expert, expert_tensor] of expertChoices(job, stage, tensor, only))
            for (const micro_batch of only("micro_batch", powers(MOST.microBatch)))
              if (train.global_batch % (micro_batch * data) === 0)
                for (const sides of exchangesOf(job, fixed, { tensor, context, pipeline, expert, expert_tensor, micro_batch, data }))
                  for (const recompute of recomputes)
                    yield { ...{ tensor, pipeline, virtual_pipeline, context, expert, expert_tensor, micro_batch, recompute }, ...sides };
      }
}

/** The degrees of a choice, as far as exchanges of rows depend on them. */
type ExchangeDegrees = Pick<JobChoice, "tensor" | "context" | "pipeline" | "expert" | "expert_tensor" | "micro_batch"> & {
  readonly data: number;
};

/** Lists how rows may be exchanged, and beside what; everything else is as given or as in the job. */
function exchangesOf({ model, parallel, train }: Job, fixed: FixedKeys, degrees: ExchangeDegrees): SideValues[] {
  const { expert, micro_batch, data } = degrees;
  const given = { ...asInJob, ...fixed };
  if (!model.moe || expert === 1 || model.moe.dispatch === "all_gather") {
    // nothing can run beside an exchange that there is not
    const isNone = parallel.expert_overlap === "none" || fixed.expert_overlap !== undefined;
    return [sidesOf({ ...given, ...(!isNone && { expert_overlap: "none" }) })];
  }
  const dispatches = others("dispatch", model.moe.dispatch, fixed).filter(
    (value) => fixed.dispatch !== undefined || value !== "once_per_node",
  );
  const microbatches = train.global_batch / (micro_batch * data);
  const overlaps = others("expert_overlap", parallel.expert_overlap, fixed).filter(
    (value) => fixed.expert_overlap !== undefined || value === "job" || (value === "interleave" && microbatches > 1),
  );
  return dispatches.flatMap((dispatch) => overlaps.map((expert_overlap) => sidesOf({ ...given, dispatch, expert_overlap })));
}

const sidesOf = ({ dispatch, expert_overlap, schedule, gradient_bucket, rows_bound }: SideValues): SideValues => ({
  ...{ dispatch, expert_overlap, schedule, gradient_bucket, rows_bound },
});

/** Returns the values of a key that differ: as the job has it, and the others; or the given one. */
function others<Key extends "dispatch" | "expert_overlap" | "schedule" | "gradient_bucket">(
  key: Key,
  own: number | string,
  fixed: FixedKeys,
): readonly SideValues[Key][] {
  const given: SideValues[Key] | undefined = (fixed as Partial<SideValues>)[key];
  if (given !== undefined) return [given];
  const values: readonly (number | string)[] = sideChoices[key];
  return ["job", ...values.filter((value) => value !== own)] as SideValues[Key][];
}

/** A value of a key beside the mesh. */
interface SideValue {
  readonly key: SideKey;
  readonly value: number | string;
}

/** Returns the values of the keys that `choicesOf` does not vary, and those of `choice` not among them, in the order in which they are worth trying. */
export function variantsOf({ model, parallel, cluster }: Job, choice: JobChoice, fixed: FixedKeys): SideValue[] {
  const hasExchange = model.moe && choice.expert > 1 && model.moe.dispatch !== "all_gather";
  const { tensor, context, pipeline, expert, expert_tensor } = choice;
  const degrees = { tensor, context, pipeline, expert, expert_tensor };
  const placed = hasExchange ? nodesOfExperts({ parallel: { ...parallel, ...degrees }, cluster }) : undefined;
  // once to each node, where the ranks of a group are on several
  const perNode = placed && hasTwoHops(placed) ? others("dispatch", model.moe?.dispatch ?? "", fixed) : [];
  const valuesOf = (key: "gradient_bucket" | "schedule" | "expert_overlap"): SideValue[] =>
    others(key, parallel[key], fixed).flatMap((value) => (value === choice[key] ? [] : [{ key, value }]));
  return [
    ...perNode.flatMap((value) => (value === "once_per_node" && choice.dispatch !== value ? [{ key: "dispatch" as const, value }] : [])),
    ...valuesOf("gradient_bucket"),
    ...(hasExchange ? valuesOf("expert_overlap") : []),
    ...(choice.pipeline > 1 ? valuesOf("schedule") : []),
  ];
}

/** Returns a choice with a lower bound of rows, which takes less memory; undefined if the bound is given, or matters to none of its buffers. */
export function withLowerBound({ model: { moe } }: Job, choice: JobChoice, fixed: FixedKeys): JobChoice | undefined {
  const [least] = sideChoices.rows_bound;
  if (!moe || choice.expert === 1 || fixed.rows_bound !== undefined || choice.rows_bound !== "job") return undefined;
  return moe.rows_bound === "worst" || moe.rows_bound > least ? { ...choice, rows_bound: least } : undefined;
}

type Only = (key: AutoKey, values: readonly number[]) => readonly number[];

/** Lists the degrees of experts: whole experts on each rank, or each expert over the tensor ranks. */
function* expertChoices({ model }: Job, stage: number, tensor: number, only: Only): Generator<readonly [number, number]> {
  if (!model.moe) {
    for (const expert of only("expert", [1])) for (const expertTensor of only("expert_tensor", [1])) yield [expert, expertTensor];
    return;
  }
  for (const expertTensor of only("expert_tensor", tensor > 1 ? [1, tensor] : [1]))
    for (const expert of only("expert", divisors(model.moe.experts, stage)))
      if (stage % (expert * expertTensor) === 0) yield [expert, expertTensor];
}

const virtualChoices = (places: number, pipeline: number): number[] =>
  pipeline === 1 ? [1] : divisors(MOST.virtual * 3, MOST.virtual).filter((chunks) => chunks * pipeline <= places);

/** Returns the values of recompute that differ for a job. */
function distinctRecomputes({ train }: Job): readonly RecomputeChoice[] {
  return train.recompute.mode === "none" ? ["none", "selective", "full"] : ["job", "none", "full"];
}

/** Modules whose recomputation costs little time for the memory that it saves. */
const cheapModules = { dense: ["layernorm", "mlp"], moe: ["layernorm", "moe_act", "moe_permute"] } as const;

/** Keys that follow from a choice, and that a job may keep as it has them. */
export type KeptKeys = Partial<Readonly<Record<"sequence" | "layout" | "distributed_optimizer", boolean>>>;

/** Returns the job with a choice. The layers that stages cannot share evenly are spread by a layout. */
export function jobWith(job: Job, choice: JobChoice, given: KeptKeys = {}): Job {
  const { recompute, micro_batch, dispatch, rows_bound, expert_overlap, schedule, gradient_bucket, ...degrees } = choice;
  const { data: _, ...parallel } = job.parallel;
  const old = job.train.recompute;
  const { moe } = job.model;
  const modules = [...cheapModules[moe ? "moe" : "dense"]];
  const changes = {
    job: old,
    none: { ...old, mode: "none" as const },
    selective: { ...old, mode: "selective" as const, modules },
    full: { ...old, mode: "full" as const },
  }[recompute];
  const ofRows = { ...(dispatch !== "job" && { dispatch }), ...(rows_bound !== "job" && { rows_bound }) };
  const isChanged = moe && Object.keys(ofRows).length > 0;
  return {
    ...job,
    ...(isChanged && { model: { ...job.model, moe: { ...moe, ...ofRows } } }),
    parallel: completeParallel({
      ...{ ...parallel, ...degrees },
      ...(expert_overlap !== "job" && { expert_overlap }),
      ...(schedule !== "job" && { schedule }),
      ...(gradient_bucket !== "job" && { gradient_bucket, parameter_bucket: gradient_bucket }),
      ...(!given.sequence && { sequence: degrees.tensor > 1 }),
      ...(!given.layout && { layout: evenLayout(job.model, choice.pipeline * choice.virtual_pipeline) ?? null }),
      ...(!given.distributed_optimizer && { distributed_optimizer: true }),
    }),
    train: { ...job.train, micro_batch, recompute: changes },
  };
}

/** Returns the keys of the job that a choice sets, as arguments of `--set`. */
export function settingsOf(job: Job, choice: JobChoice): string[] {
  const { model, parallel, train } = jobWith(job, choice);
  const { tensor, pipeline, virtual_pipeline, context, expert, expert_tensor, sequence, layout } = parallel;
  return [
    ...Object.entries({ world: parallel.world, tensor, sequence, pipeline, virtual_pipeline, context, expert, expert_tensor }).map(
      ([key, value]) => `parallel.${key}=${value}`,
    ),
    "parallel.distributed_optimizer=true",
    `parallel.layout=${layout ?? "null"}`,
    `train.micro_batch=${train.micro_batch}`,
    ...(!model.moe || choice.dispatch === "job" ? [] : [`model.moe.dispatch=${model.moe.dispatch}`]),
    ...(!model.moe || choice.rows_bound === "job" ? [] : [`model.moe.rows_bound=${choice.rows_bound}`]),
    ...(choice.expert_overlap === "job" ? [] : [`parallel.expert_overlap=${choice.expert_overlap}`]),
    ...(choice.schedule === "job" ? [] : [`parallel.schedule=${choice.schedule}`]),
    ...(choice.gradient_bucket === "job"
      ? []
      : [`parallel.gradient_bucket=${choice.gradient_bucket}`, `parallel.parameter_bucket=${choice.gradient_bucket}`]),
    ...(choice.recompute === "job" ? [] : [`train.recompute.mode=${train.recompute.mode}`]),
    ...(choice.recompute === "selective" ? [`train.recompute.modules=[${train.recompute.modules.join(", ")}]`] : []),
  ];
}
