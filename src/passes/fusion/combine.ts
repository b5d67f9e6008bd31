/** Fusion of unpermute with the sum that reads it: of the residual stream forward, of the gradients of tokens backward. */
import { writesOf } from "../../../schemas/effects.ts";
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { BufferUses } from "./bufferUses.ts";
import { canMove } from "./canMove.ts";

/** Replaces an addition, and the unpermute that alone makes one of its addends, by one instruction in the place of the addition. */
export function fuseCombine(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  const producers = new Map<string, number>();
  const gone = new Set<Instruction>();
  const out = list.map((i, at) => {
    const found = i.kind === "compute" && i.op === "add" ? sumOf(i, list.slice(0, at), producers, uses) : undefined;
    if (found) gone.add(found.part);
    for (const id of writesOf(i, { get: (buffer) => uses.get(buffer) })) producers.set(id, at);
    return found?.by ?? i;
  });
  return out.filter((i) => !gone.has(i));
}

/** Returns the instruction that replaces an addition and the unpermute of one addend; undefined if no addend is one. */
function sumOf(add: Compute, before: readonly Instruction[], producers: ReadonlyMap<string, number>, uses: BufferUses) {
  const { a, b } = add.reads;
  const { y } = add.writes;
  if (a === undefined || b === undefined || y === undefined || a === b || add.accumulates) return undefined;
  for (const [own, z] of [
    [b, a],
    [a, b],
  ] as const) {
    const at = producers.get(own);
    const part = at === undefined ? undefined : before[at];
    if (at === undefined || part?.kind !== "compute" || part.op !== "unpermute" || !uses.isBetweenTwo(own)) continue;
    const isUniform = [own, z].every((id) => uses.get(id).dtype === uses.get(y).dtype);
    if (!isUniform || !canMove(part, before.slice(at + 1), uses)) continue;
    uses.delete(own);
    const by: Compute = { ...part, id: add.id, op: "unpermute_add", reads: { ...part.reads, z }, writes: { x: y } };
    return { part, by };
  }
  return undefined;
}
