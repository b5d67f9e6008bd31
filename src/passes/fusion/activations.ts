/** The output of swiglu is not kept for backward: the gradient of swiglu has its operands in registers and returns it once more. */
import { touchedBy } from "../../../schemas/effects.ts";
import type { Chunk, Compute, Instruction } from "../../../schemas/plan.ts";
import type { BufferUses } from "./bufferUses.ts";

/** Per op of the gradient, the op that also returns the output, and the op of forward. */
const gradients = {
  swiglu_grad: { op: "swiglu_grad_again", forward: "swiglu" },
  swiglu_rows_grad: { op: "swiglu_rows_grad_again", forward: "swiglu_rows" },
} as const;

/**
 * Returns a chunk in which gradients of swiglu return its output for the weight gradients that read it. Weight gradients of the backward block
 * then follow the gradient, and the output is a workspace; those of the weights block read it from an activation that backward writes.
 */
export function returnActivationsAgain(chunk: Chunk, uses: BufferUses): Chunk {
  const outputs = new Map<string, string>();
  const keyOf = (op: string, { reads }: Compute): string => JSON.stringify([op, reads.gate, reads.up, reads.p]);
  for (const i of chunk.forward) if (i.kind === "compute" && i.writes.y !== undefined) outputs.set(keyOf(i.op, i), i.writes.y);
  let out = chunk;
  for (const i of chunk.backward) {
    if (i.kind !== "compute" || (i.op !== "swiglu_grad" && i.op !== "swiglu_rows_grad")) continue;
    const { op, forward } = gradients[i.op];
    const y = outputs.get(keyOf(forward, i));
    if (y !== undefined) out = withOutput(out, i, { op, y }, uses);
  }
  return out;
}

/** Returns the chunk with the output from the gradient `of`, if weight gradients of one block alone read it. */
function withOutput(
  chunk: Chunk,
  of: Compute,
  { op, y }: { readonly op: "swiglu_grad_again" | "swiglu_rows_grad_again"; readonly y: string },
  uses: BufferUses,
): Chunk {
  const id = `${y}.again`;
  const buffers = { get: (b: string) => uses.get(b) };
  const readers = (list: readonly Instruction[]) => list.filter((i) => touchedBy(i, buffers).has(y));
  const productsOf = (list: readonly Instruction[]) =>
    readers(list).filter((i): i is Compute => i.kind === "compute" && i.op.endsWith("_wgrad") && i.reads.x === y);
  const [products, later] = [productsOf(chunk.backward), productsOf(chunk.weights)];
  const kept = uses.get(y);
  const isAlone = readers(chunk.forward).length + products.length + later.length === uses.countOf(y);
  const ofOneBlock = products.length > 0 !== later.length > 0;
  if (!ofOneBlock || !isAlone || kept.kind !== "activation" || uses.has(id)) return chunk;
  const { chunk: _, ...plain } = kept;
  uses.set({ ...plain, kind: "workspace" });
  uses.set(later.length > 0 ? { ...kept, id } : { ...plain, id, kind: "workspace" });
  const readsAgain = (i: Compute): Compute => ({ ...i, reads: { ...i.reads, x: id } });
  const isOf = (i: Instruction, list: readonly Compute[]): i is Compute => list.some((product) => product === i);
  return {
    ...chunk,
    backward: chunk.backward.flatMap((i): Instruction[] => {
      if (i === of) return [{ ...of, op, writes: { ...of.writes, y: id } }, ...products.map(readsAgain)];
      return isOf(i, products) ? [] : [i];
    }),
    weights: chunk.weights.map((i) => (isOf(i, later) ? readsAgain(i) : i)),
  };
}
