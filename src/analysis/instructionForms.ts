/**
 * Forms of buffers and of compute instructions: what they are without their names, as texts that are equal for equal ones. Layers repeat, so what
 * depends on a form alone (a kernel spec, a law about sizes) is found once per form (src/repeats.ts). The texts are JSON, so that no name in a
 * plan from elsewhere can give two instructions one form.
 */
import type { Buffer, Compute } from "../../schemas/plan.ts";

/** Returns the form of a buffer: its type and sizes, and how it is sharded. Its kind, partial sums and indices are no part of it. */
export const bufferForm = ({ dtype, ragged, shape, sizes, shardedBy }: Buffer): string =>
  JSON.stringify([dtype, ragged, shape, sizes, shardedBy]);

/**
 * Returns the form of a compute instruction: its op, sizes, attributes, and the forms of its operands, for which `formOf` has numbers. Kernels, waits
 * and the index that it writes are no part of it. `attrs`: those of its attributes that count.
 */
export function computeForm(i: Compute, formOf: (buffer: string) => number | undefined, attrs: Compute["attrs"] = i.attrs): string {
  const operands: unknown[] = [];
  for (const name in i.reads) operands.push(name, formOf(i.reads[name] ?? ""));
  operands.push(0);
  for (const name in i.writes) operands.push(name, formOf(i.writes[name] ?? ""));
  return JSON.stringify([i.op, attrs, i.dims, i.blocks, i.accumulates, i.ringOffset, i.tensors, operands]);
}
