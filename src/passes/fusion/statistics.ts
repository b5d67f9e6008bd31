/** Fusion of the loss: maximum, sum of exponentials and target of a row of logits in one pass. */
import type { Compute, Instruction } from "../../../schemas/plan.ts";

/** Replaces row_max and softmax_terms by one instruction where no reduction over ranks is between them. */
export function fuseStatistics(list: readonly Instruction[]): Instruction[] {
  const maxima = new Map<string, Compute>();
  const fused = new Map<Instruction, Compute>();
  const gone = new Set<Instruction>();
  for (const i of list) {
    if (i.kind !== "compute") continue;
    const { m } = i.writes;
    if (i.op === "row_max" && m !== undefined) maxima.set(m, i);
    if (i.op !== "softmax_terms") continue;
    const max = maxima.get(i.reads.m ?? "");
    if (!max || max.reads.x !== i.reads.x || i.dims.V?.[1].length !== 0) continue;
    const { m: most, ...reads } = i.reads;
    if (most === undefined) continue;
    fused.set(i, { ...i, op: "softmax_statistics", reads, writes: { m: most, ...i.writes } });
    gone.add(max);
  }
  return list.flatMap((i) => (gone.has(i) ? [] : [fused.get(i) ?? i]));
}
