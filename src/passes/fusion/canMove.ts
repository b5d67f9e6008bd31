/** Whether fusion may run an instruction later or earlier. */
import { readsOf, rowIndexOf, writesOf } from "../../../schemas/effects.ts";
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { BufferUses } from "./bufferUses.ts";

/** Returns whether an instruction may pass others, to run after or before them: they neither read what it writes nor write what it reads or writes. */
export function canMove(i: Compute, others: readonly Instruction[], uses: BufferUses): boolean {
  const buffers = { get: (id: string) => uses.get(id) };
  const written = new Set(writesOf(i, buffers));
  const fixed = new Set([...Object.values(i.reads), ...written, rowIndexOf(i, buffers)]);
  return others.every((other) => !readsOf(other).some((id) => written.has(id)) && !writesOf(other, buffers).some((id) => fixed.has(id)));
}
