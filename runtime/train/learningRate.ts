/**
 * Learning rate and weight decay of a step, as in Megatron Core's OptimizerParamScheduler. Schedules count samples trained before the
 * step; skipped steps do not count. Lengths are in steps of global_batch sequences, so without a batch ramp-up a schedule counts steps.
 */

import { lengthOf } from "../../schemas/batchRampup.ts";
import type { Job } from "../../schemas/job.ts";

type Optimizer = Job["train"]["optimizer"];

/**
 * Returns the learning rate after `samples` trained sequences.
 * With t = samples / global_batch, w = warmup_steps, d = decay_steps, which includes the warm-up, f = wsd_decay_steps:
 *   t <= w, w > 0:        warmup_init + (lr - warmup_init) * t / w         (so the first step of a warm-up has rate warmup_init)
 *   constant:             lr
 *   t > d:                min_lr
 *   inverse_square_root:  max(min_lr, lr * sqrt(w / t)), neither w nor t below one sample
 *   else:                 min_lr + (lr - min_lr) * c((t - w) / (d - w)),   linear c(x) = 1 - x, cosine c(x) = (1 + cos(pi x)) / 2
 *   wsd:                  ... * c((t - (d - f)) / f), 1 before that;       exponential c(x) = 2 / 2^x - 1, minus_sqrt c(x) = 1 - sqrt(x)
 */
export function learningRate(train: Pick<Job["train"], "global_batch"> & { readonly optimizer: Rates }, samples: number): number {
  const { schedule, lr, min_lr, warmup_steps: w, warmup_init, decay_steps: d } = train.optimizer;
  const t = samples / train.global_batch;
  if (w > 0 && t <= w) return warmup_init + ((lr - warmup_init) * t) / w;
  if (schedule === "constant") return lr;
  if (t > d) return min_lr;
  if (schedule === "inverse_square_root") {
    const sample = 1 / train.global_batch;
    return Math.max(min_lr, lr * Math.sqrt(Math.max(w, sample) / Math.max(t, sample)));
  }
  return min_lr + (lr - min_lr) * left(train.optimizer, t);
}
type Rates = Pick<
  Optimizer,
  "schedule" | "lr" | "min_lr" | "warmup_steps" | "warmup_init" | "decay_steps" | "wsd_decay" | "wsd_decay_steps"
>;

/** Returns the fraction of lr - min_lr that remains at time t (steps). */
function left({ schedule, warmup_steps: w, decay_steps: d, wsd_decay, wsd_decay_steps }: Rates, t: number): number {
  if (schedule !== "wsd") return shapes[schedule === "linear" ? "linear" : "cosine"](d > w ? (t - w) / (d - w) : 1);
  const f = wsd_decay_steps!;
  return t <= d - f ? 1 : shapes[wsd_decay]((t - (d - f)) / f);
}
const shapes: Readonly<Record<Optimizer["wsd_decay"], (x: number) => number>> = {
  linear: (x) => 1 - x,
  cosine: (x) => (1 + Math.cos(Math.PI * x)) / 2,
  exponential: (x) => 2 * 0.5 ** x - 1,
  minus_sqrt: (x) => 1 - Math.sqrt(x),
};

/** Returns the weight decay: from weight_decay_start to weight_decay_end over the whole run, linear or half a cosine. */
export function weightDecay(train: Parameters<typeof lengthOf>[0] & { readonly optimizer: Decays }, samples: number): number {
  const { weight_decay, weight_decay_schedule: schedule, weight_decay_start: start, weight_decay_end: end } = train.optimizer;
  if (schedule === "constant") return weight_decay;
  const x = samples / train.global_batch / lengthOf(train);
  if (x > 1) return end!;
  return start! + (end! - start!) * (schedule === "linear" ? x : (1 + Math.cos(Math.PI * (1 - x))) / 2);
}
type Decays = Pick<Optimizer, "weight_decay" | "weight_decay_schedule" | "weight_decay_start" | "weight_decay_end">;
