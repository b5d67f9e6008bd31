/** The choices of a search: how a model is spread over ranks, and what of the batch and of recomputation goes with it. */

import { type AutoKey, autoNames } from "../../schemas/job/autoKeys.ts";
import { completeParallel } from "../../schemas/job/parallel.ts";
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { evenLayout } from "../analysis/evenLayout.ts";

/** The keys that a search decides, with short names for tables. */
export const searchedKeys = autoNames;
/** The name of a key that a search decides. */
export type SearchedKey = AutoKey;

/** Values of recompute that a search tries: as the job has it, nothing, the norms and activations of experts, or whole layers. */
export const recomputeChoices = ["job", "none", "selective", "full"] as const;
/** A value of recompute. */
export type RecomputeChoice = (typeof recomputeChoices)[number];

/** One way to run a job. */
export interface JobChoice extends Readonly<Record<Exclude<SearchedKey, "recompute">, number>> {
  readonly recompute: RecomputeChoice;
}

/** Keys whose values are given. */
export type FixedKeys = Partial<Record<SearchedKey, number | RecomputeChoice>>;

/** Largest values that are tried: tensor ranks beyond a node and deeper pipelines are outside of what models of today use. */
const MOST = { pipeline: 64, virtual: 8, context: 16, microBatch: 4 } as const;

const divisors = (n: number, most: number): number[] => {
  const found: number[] = [];
  for (let d = 1; d <= Math.min(n, most); d++) if (n % d === 0) found.push(d);
  return found;
};
/** The powers of two up to `most`: the divisors of the largest. */
const powers = (most: number): number[] => divisors(2 ** Math.floor(Math.log2(Math.max(1, most))), most);

/** Lists the choices whose sizes divide, for the ranks of the job. `fixed` limits keys to one value. */
export function* choicesOf(job: Job, fixed: FixedKeys): Generator<JobChoice> {
  const { model, parallel, train, cluster } = job;
  const { world } = parallel;
  const only = <T extends number | string>(key: SearchedKey, values: readonly T[]): readonly T[] => {
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
                for (const recompute of recomputes)
                  yield { tensor, pipeline, virtual_pipeline, context, expert, expert_tensor, micro_batch, recompute };
      }
}

type Only = (key: SearchedKey, values: readonly number[]) => readonly number[];

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
  const { recompute, micro_batch, ...degrees } = choice;
  const { data: _, ...parallel } = job.parallel;
  const old = job.train.recompute;
  const modules = [...cheapModules[job.model.moe ? "moe" : "dense"]];
  const changes = {
    job: old,
    none: { ...old, mode: "none" as const },
    selective: { ...old, mode: "selective" as const, modules },
    full: { ...old, mode: "full" as const },
  }[recompute];
  return {
    ...job,
    parallel: completeParallel({
      ...{ ...parallel, ...degrees },
      ...(!given.sequence && { sequence: degrees.tensor > 1 }),
      ...(!given.layout && { layout: evenLayout(job.model, choice.pipeline * choice.virtual_pipeline) ?? null }),
      ...(!given.distributed_optimizer && { distributed_optimizer: true }),
    }),
    train: { ...job.train, micro_batch, recompute: changes },
  };
}

/** Returns the keys of the job that a choice sets, as arguments of `--set`. */
export function settingsOf(job: Job, choice: JobChoice): string[] {
  const { parallel, train } = jobWith(job, choice);
  const { tensor, pipeline, virtual_pipeline, context, expert, expert_tensor, sequence, layout } = parallel;
  return [
    ...Object.entries({ world: parallel.world, tensor, sequence, pipeline, virtual_pipeline, context, expert, expert_tensor }).map(
      ([key, value]) => `parallel.${key}=${value}`,
    ),
    "parallel.distributed_optimizer=true",
    `parallel.layout=${layout ?? "null"}`,
    `train.micro_batch=${train.micro_batch}`,
    ...(choice.recompute === "job" ? [] : [`train.recompute.mode=${train.recompute.mode}`]),
    ...(choice.recompute === "selective" ? [`train.recompute.modules=[${train.recompute.modules.join(", ")}]`] : []),
  ];
}
