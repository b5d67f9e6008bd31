/** Fusion of two products of one operand with equal sizes: keys and values, their weight gradients, and those of gate and up of experts. */
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { FusedOpName } from "../../ops/index.ts";
import type { BufferUses } from "./bufferUses.ts";
import { canMove } from "./canMove.ts";

/** Per product, the op of two that read one `x`, and the names of the operand and of the result of each: numbers follow them in the op of two. */
interface Pair {
  readonly op: FusedOpName;
  readonly read: string;
  readonly write: string;
}
const pairs: Readonly<Record<string, Pair>> = {
  gemm: { op: "gemm_pair", read: "w", write: "y" },
  gemm_wgrad: { op: "gemm_wgrad_pair", read: "dy", write: "dw" },
  grouped_wgrad: { op: "grouped_wgrad_pair", read: "dy", write: "dw" },
};

/** Replaces two products with one first operand and equal sizes by one instruction, in the place of the later one where possible, else of the earlier one. */
export function fuseTwins(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  // by what both must share, the index of a product without a twin
  const waiting = new Map<string, number>();
  const out: (Instruction | undefined)[] = [...list];
  for (const [at, i] of list.entries()) {
    const pair = i.kind === "compute" ? pairs[i.op] : undefined;
    if (i.kind !== "compute" || pair === undefined) continue;
    const key = sharedBy(i, uses);
    const start = waiting.get(key);
    const first = start === undefined ? undefined : list[start];
    waiting.delete(key);
    if (start === undefined || first?.kind !== "compute") {
      waiting.set(key, at);
      continue;
    }
    const between = out.slice(start + 1, at).flatMap((other) => other ?? []);
    if (canMove(first, between, uses)) [out[start], out[at]] = [undefined, pairOf(pair, first, i)];
    else if (canMove(i, between, uses)) [out[start], out[at]] = [pairOf(pair, first, i), undefined];
    else waiting.set(key, at);
  }
  return out.flatMap((i) => i ?? []);
}

/** Returns what two products must have in common. */
function sharedBy(i: Compute, uses: BufferUses): string {
  const types = Object.values({ ...i.reads, ...i.writes }).map((id) => uses.get(id).dtype);
  return JSON.stringify([i.op, i.reads.x, i.dims, i.accumulates, i.ringOffset, types]);
}

/** Returns the instruction that replaces two products. */
function pairOf({ op, read, write }: Pair, first: Compute, second: Compute): Compute {
  const both = [first, second].map((i, n) => [i, n + 1] as const);
  return {
    ...second,
    op,
    reads: { x: second.reads.x ?? "", ...Object.fromEntries(both.map(([i, n]) => [`${read}${n}`, i.reads[read] ?? ""])) },
    writes: Object.fromEntries(both.map(([i, n]) => [`${write}${n}`, i.writes[write] ?? ""])),
    ...(second.accumulates && { accumulates: both.map(([, n]) => `${write}${n}`) }),
  };
}
