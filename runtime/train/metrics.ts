/** Reads the metrics of a step from the device, once, after the step. */

import type { Buffer, MetricName, Plan } from "../../schemas/plan.ts";
import { rankAt } from "../../schemas/sharding.ts";
import type { HostData, LocalRanks } from "../backend.ts";

/** Sums over the stages; a metric that no stage has is missing. */
export interface StepNumbers {
  readonly loss: number;
  /** The sum of the balancing losses, without the z loss. */
  readonly aux_loss?: number;
  readonly z_loss?: number;
  readonly mtp_loss?: number;
  /** Rows dropped because of a capacity, summed over layers. */
  readonly dropped_rows?: number;
  readonly grad_norm: number;
  /** Tokens of the busiest expert over the mean of its layer; the maximum over layers. */
  readonly expert_load?: number;
}

const summed = ["loss", "aux_loss", "z_loss", "mtp_loss", "dropped_rows"] as const;

/** Reads the metrics of stages whose first rank is a local rank, and combines them with those of other processes. */
export async function readNumbers(
  { programs, mesh }: Plan,
  { ranks, rankDevice, combine = async (values) => [...values] }: Pick<LocalRanks, "ranks" | "rankDevice" | "combine">,
  bufferOf: (rank: number, id: string) => Buffer,
): Promise<StepNumbers> {
  const sums = new Map<MetricName, number>(summed.map((name) => [name, 0]));
  let norm = 0;
  const largestLoads = programs.map(() => 0);
  for (const { stage, metrics } of programs) {
    const rank = rankAt(mesh, stage, 0);
    if (!ranks.includes(rank)) continue;
    const read = (name: MetricName): Promise<HostData[]> =>
      Promise.all((metrics[name] ?? []).map((id) => rankDevice(rank).read(bufferOf(rank, id), 0)));
    for (const name of summed) for (const [value = 0] of await read(name)) sums.set(name, (sums.get(name) ?? 0) + value);
    // the gradient norm is equal on all ranks
    if (stage === 0) for (const [value = 0] of await read("grad_norm")) norm = value;
    const [table] = metrics.expert_loads ?? [];
    if (table !== undefined) largestLoads[stage] = largestLoad(await read("expert_loads"), bufferOf(rank, table).sizes[1] ?? 1);
  }
  const all = await combine([norm, ...sums.values(), ...largestLoads]);
  const [grad_norm = 0, loss = 0] = all;
  const has = (name: MetricName): boolean => programs.some(({ metrics }) => metrics[name] !== undefined);
  return {
    ...Object.fromEntries(summed.flatMap((name, i) => (has(name) ? [[name, all[1 + i] ?? 0]] : []))),
    ...{ loss, grad_norm },
    ...(has("expert_loads") && { expert_load: Math.max(...all.slice(1 + summed.length)) }),
  };
}

/** Returns the maximum over rows (layers) of the largest count over the mean; `parts` are summed first; 0 if all counts are 0. */
function largestLoad(parts: readonly HostData[], experts: number): number {
  const [first] = parts;
  let largest = 0;
  for (let row = 0; row < (first?.length ?? 0); row += experts) {
    const counts = Array.from({ length: experts }, (_, e) => parts.reduce((sum, part) => sum + (part[row + e] ?? 0), 0));
    const total = counts.reduce((a, b) => a + b, 0);
    if (total > 0) largest = Math.max(largest, (Math.max(...counts) * experts) / total);
  }
  return largest;
}

/** Returns the metrics to report. `upscale`: global_batch / batch; `aux`: the weight of balancing and z losses; `loss`, `mtp`: factors of `meanOverLearnt`. */
export function reported(
  { loss, mtp_loss, aux_loss = 0, z_loss, ...counts }: StepNumbers,
  by: { readonly upscale: number; readonly aux: number; readonly loss: number; readonly mtp: number },
) {
  const added = by.upscale * by.aux;
  return {
    loss: loss * by.upscale * by.loss,
    ...(mtp_loss !== undefined && { mtp_loss: mtp_loss * by.upscale * by.mtp }),
    aux_loss: (aux_loss + (z_loss ?? 0)) * added,
    ...(z_loss !== undefined && { z_loss: z_loss * added }),
    ...counts,
  };
}
