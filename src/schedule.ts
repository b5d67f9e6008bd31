/**
 * schedule: the order of work of each role. 1F1B (Narayanan et al. 2021): stage s runs ahead by pipeline - s - 1 forwards,
 * then alternates one forward and one backward, so it never holds more than pipeline - s microbatches.
 */
import type { Job } from "../schemas/job.ts";

export interface Schedule {
  readonly order: readonly string[];
  /** Microbatches in flight at most: copies of every activation that backward needs. */
  readonly slots: number;
}

export const microbatchesOf = ({ train, parallel }: Pick<Job, "train" | "parallel">): number =>
  train.global_batch / (train.micro_batch * parallel.data);

export function schedule(job: Pick<Job, "train" | "parallel">): Schedule[] {
  const m = microbatchesOf(job);
  const stages = job.parallel.pipeline;
  return Array.from({ length: stages }, (_, stage) => {
    const ahead = Math.min(m, stages - stage - 1);
    const order = [
      ...Array.from({ length: ahead }, (_, i) => `F${i}`),
      ...Array.from({ length: m - ahead }, (_, i) => [`F${ahead + i}`, `B${i}`]).flat(),
      ...Array.from({ length: ahead }, (_, i) => `B${m - ahead + i}`),
    ];
    return { order, slots: Math.min(m, stages - stage) };
  });
}

export function printSchedule(roles: readonly Schedule[]): string {
  return roles.map((r, s) => `stage ${s}  ${r.slots} in flight  ${r.order.join(" ")}\n`).join("");
}
