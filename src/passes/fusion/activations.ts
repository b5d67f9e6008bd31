/** The output of swiglu is not kept for backward: the gradient of swiglu has its operands in registers and returns it once more. */
import { touchedBy } from "../../../schemas/effects.ts";
import type { Chunk, Compute, Instruction } from "../../../schemas/plan.ts";
import type { BufferUses } from "./bufferUses.ts";

/** Per op of the gradient, the op that also returns the output, and the op of forward. */
const again = {
  swiglu_grad: { op: "swiglu_grad_again", forward: "swiglu" },
  swiglu_rows_grad: { op: "swiglu_rows_grad_again", forward: "swiglu_rows" },
} as const;

/** Returns a chunk in which gradients of swiglu return its output for the weight gradients that read it, which then follow them. */
export function returnActivationsAgain(chunk: Chunk, uses: BufferUses): Chunk {
  const outputs = new Map<string, string>();
  const keyOf = (op: string, { reads }: Compute): string => JSON.stringify([op, reads.gate, reads.up, reads.p]);
  for (const i of chunk.forward) if (i.kind === "compute" && i.writes.y !== undefined) outputs.set(keyOf(i.op, i), i.writes.y);
  let { backward } = chunk;
  for (const i of chunk.backward) {
    if (i.kind !== "compute" || (i.op !== "swiglu_grad" && i.op !== "swiglu_rows_grad")) continue;
    const { op, forward } = again[i.op];
    const y = outputs.get(keyOf(forward, i));
    if (y !== undefined) backward = withOutput(backward, i, { op, y }, chunk, uses);
  }
  return { ...chunk, backward };
}

/** Returns backward with the output from the gradient `of`, if weight gradients of this block alone read it there. */
function withOutput(
  backward: Instruction[],
  of: Compute,
  { op, y }: { readonly op: "swiglu_grad_again" | "swiglu_rows_grad_again"; readonly y: string },
  { forward }: Chunk,
  uses: BufferUses,
): Instruction[] {
  const id = `${y}.again`;
  const buffers = { get: (b: string) => uses.get(b) };
  const readers = (list: readonly Instruction[]) => list.filter((i) => touchedBy(i, buffers).has(y));
  const products = readers(backward).filter((i): i is Compute => i.kind === "compute" && i.op.endsWith("_wgrad") && i.reads.x === y);
  const kept = uses.get(y);
  const isAlone = readers(forward).length + products.length === uses.countOf(y) && products.length === readers(backward).length;
  if (products.length === 0 || !isAlone || kept.kind !== "activation" || uses.has(id)) return backward;
  const { chunk: _, ...plain } = kept;
  uses.set({ ...plain, kind: "workspace" });
  uses.set({ ...plain, id, kind: "workspace" });
  const moved = products.map((i): Compute => ({ ...i, reads: { ...i.reads, x: id } }));
  return backward.flatMap((i) => {
    if (i === of) return [{ ...of, op, writes: { ...of.writes, y: id } }, ...moved];
    return products.some((product) => product === i) ? [] : [i];
  });
}
