/** The scalars of a run's log, under the names that Megatron-LM gives them in TensorBoard, where it has the same number. */

import { deviceOf } from "../../../schemas/devices.ts";
import type { Plan } from "../../../schemas/plan.ts";
import type { EvaluationResult, StepResult } from "../../../schemas/stepResult.ts";
import { attentionFlops, modelFlops } from "../../analysis/modelFlops.ts";
import { largest } from "../../units.ts";

/** A number under a name; undefined where the run does not have it. */
export type Scalars = Readonly<Record<string, number | undefined>>;

/** Numbers of a plan that all its steps share. */
export interface PlanNumbers {
  readonly ranks: number;
  readonly batch: number;
  readonly seq: number;
  /** FLOP of the model for one sequence, forward and backward. */
  readonly flops: number;
  /** The part of it that is attention to the whole sequence. */
  readonly attention: number;
  /** Peak of a device in FLOP/s in the precision of the job. */
  readonly peak: number | undefined;
  /** Memory of the largest rank, in bytes. */
  readonly memory: number;
}

/** Returns the numbers of a plan. */
export function planNumbers({ job, mesh, memory }: Plan): PlanNumbers {
  const { train, model, cluster } = job;
  const type = ({ fp32: "f32", bf16: "bf16", fp16: "f16" } as const)[train.precision];
  return {
    ...{ ranks: mesh.world, batch: train.global_batch, seq: model.seq, flops: modelFlops(model) },
    attention: attentionFlops(model),
    peak: deviceOf(cluster.device).peak[type] ?? undefined,
    memory: largest(memory, ({ peak }) => peak),
  };
}

/** The steps since the last log line. */
export interface Interval {
  readonly last: StepResult;
  readonly steps: readonly StepResult[];
  /** Sequences read since the run began. */
  readonly samples: number;
  /** The largest memory in use that a step of this process has read, in bytes. */
  readonly largestMemory?: number | undefined;
}

const mean = (all: readonly number[]): number => all.reduce((a, b) => a + b, 0) / all.length;
/** The mean of a number over steps; undefined if none has it. */
function meanOf(steps: readonly StepResult[], of: (r: StepResult) => number | undefined): number | undefined {
  const found = steps.flatMap((r) => of(r) ?? []);
  return found.length > 0 ? mean(found) : undefined;
}

/** Returns the scalars of the steps since the last line: losses, times and speeds are means, others are those of the last step. */
export function stepScalars({ last, steps, samples, largestMemory }: Interval, plan: PlanNumbers): Scalars {
  const seconds = mean(steps.map((r) => r.seconds));
  const tokens = mean(steps.map((r) => r.tokens));
  const unseen = last.attention_share === undefined ? 0 : 1 - last.attention_share;
  const perSecond = ((plan.flops - unseen * plan.attention) * tokens) / plan.seq / seconds / plan.ranks;
  const isSparse = last.expert_load !== undefined;
  return {
    "lm loss": meanOf(steps, (r) => r.loss),
    "mtp loss": meanOf(steps, (r) => r.mtp_loss),
    ...Object.fromEntries((last.mtp_losses ?? []).map((_, k) => [`mtp loss/depth ${k + 1}`, meanOf(steps, (r) => r.mtp_losses?.[k])])),
    load_balancing_loss: isSparse ? meanOf(steps, (r) => r.aux_loss - (r.z_loss ?? 0)) : undefined,
    z_loss: meanOf(steps, (r) => r.z_loss),
    "learning-rate": last.lr,
    "grad-norm": last.grad_norm,
    "params-norm": last.parameter_norm,
    "loss-scale": last.loss_scale,
    "batch-size": last.tokens / plan.seq,
    samples,
    tokens: samples * plan.seq,
    "iteration-time": seconds,
    "tokens/s": tokens / seconds,
    throughput: perSecond / 1e12,
    "throughput/share of peak": plan.peak === undefined ? undefined : perSecond / plan.peak,
    "data wait": meanOf(steps, (r) => r.data_wait_seconds),
    "mem-planned-bytes": plan.memory,
    "mem-allocated-bytes": last.memory_bytes,
    "mem-max-allocated-bytes": largestMemory,
    "skipped iterations": last.skipped === undefined ? undefined : steps.filter((r) => r.skipped).length,
    "moe/max over mean load": last.expert_load,
    "moe/dropped rows": last.dropped_rows,
    "moe/router entropy": meanOf(steps, (r) => r.router_entropy),
    "moe/expert bias min": last.expert_bias?.[0],
    "moe/expert bias max": last.expert_bias?.[1],
  };
}

/** Returns the scalars of an evaluation. */
export function evaluationScalars({ part, loss, perplexity, sources }: EvaluationResult): Scalars {
  const each =
    sources.length > 1
      ? sources.flatMap((s) => [
          [`lm loss ${part}/${s.source}`, s.loss] as const,
          [`lm loss ${part} ppl/${s.source}`, s.perplexity] as const,
        ])
      : [];
  return { [`lm loss ${part}`]: loss, [`lm loss ${part} ppl`]: perplexity, ...Object.fromEntries(each) };
}
