/** Fusion of two weight gradients of the same rows of experts, as those of gate and up. */
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { BufferUses } from "./bufferUses.ts";
import { canMove } from "./canMove.ts";

/** Replaces two weight gradients with one first operand and equal sizes by one instruction in the place of the later. */
export function fuseTwins(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  // by what both must share, the index of a weight gradient without a twin
  const waiting = new Map<string, number>();
  const gone = new Set<Instruction>();
  const out = list.map((i, at) => {
    if (i.kind !== "compute" || i.op !== "grouped_wgrad") return i;
    const key = sharedBy(i, uses);
    const start = waiting.get(key);
    const first = start === undefined ? undefined : list[start];
    waiting.delete(key);
    if (start !== undefined && first?.kind === "compute" && canMove(first, list.slice(start + 1, at), uses)) {
      gone.add(first);
      return pairOf(first, i);
    }
    waiting.set(key, at);
    return i;
  });
  return out.filter((i) => !gone.has(i));
}

/** Returns what two weight gradients must have in common. */
function sharedBy(i: Compute, uses: BufferUses): string {
  const types = Object.values({ ...i.reads, ...i.writes }).map((id) => uses.get(id).dtype);
  return JSON.stringify([i.reads.x, i.dims, i.accumulates, i.ringOffset, types]);
}

/** Returns the instruction that replaces two weight gradients. */
function pairOf(first: Compute, second: Compute): Compute {
  const { x = "" } = second.reads;
  return {
    ...second,
    op: "grouped_wgrad_pair",
    dims: second.dims,
    reads: { x, dy1: first.reads.dy ?? "", dy2: second.reads.dy ?? "" },
    writes: { dw1: first.writes.dw ?? "", dw2: second.writes.dw ?? "" },
    ...(second.accumulates && { accumulates: ["dw1", "dw2"] }),
  };
}
