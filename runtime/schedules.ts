/** The learning rate of a step, as Megatron Core's OptimizerParamScheduler sets it when steps, not samples, are counted. */
import type { Job } from "../schemas/job.ts";

type Schedule = Pick<Job["train"]["optimizer"], "schedule" | "lr" | "min_lr" | "warmup_steps" | "decay_steps">;

/**
 * `step` counts from 0: it is the number of steps finished before this one. With t = step, w = warmup_steps, d = decay_steps:
 *   t <= w, w > 0:   lr * t / w                                       (so the first step of a warm-up has rate 0)
 *   constant:        lr
 *   t >= d:          min_lr
 *   else:            min_lr + (lr - min_lr) * c((t - w) / (d - w)),   linear c(x) = 1 - x, cosine c(x) = (1 + cos(pi x)) / 2
 * d counts from step 0: it includes the warm-up.
 */
export function learningRate(optimizer: Schedule, step: number): number {
  const { schedule, lr, min_lr, warmup_steps, decay_steps } = optimizer;
  if (warmup_steps > 0 && step <= warmup_steps) return (lr * step) / warmup_steps;
  if (schedule === "constant") return lr;
  if (step >= decay_steps) return min_lr;
  const x = (step - warmup_steps) / (decay_steps - warmup_steps);
  return min_lr + (lr - min_lr) * (schedule === "linear" ? 1 - x : (1 + Math.cos(Math.PI * x)) / 2);
}
