/** Whether fusion may run an instruction later. */
import { readsOf, rowIndexOf, writesOf } from "../../../schemas/effects.ts";
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { BufferUses } from "./bufferUses.ts";

/** Returns whether an instruction may run after those that follow it: they neither read what it writes nor write what it reads or writes. */
export function canMove(i: Compute, after: readonly Instruction[], uses: BufferUses): boolean {
  const buffers = { get: (id: string) => uses.get(id) };
  const written = new Set(writesOf(i, buffers));
  const fixed = new Set([...Object.values(i.reads), ...written, rowIndexOf(i, buffers)]);
  return after.every((other) => !readsOf(other).some((id) => written.has(id)) && !writesOf(other, buffers).some((id) => fixed.has(id)));
}
