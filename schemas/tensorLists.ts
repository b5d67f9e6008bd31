/**
 * Tensor lists: one instruction that runs its op for several tensors of one type. Operands that the signature of the op writes `...` are lists,
 * all others are shared. Operand `name` of the first tensor has that name, those of the others are `name.1`, `name.2` and so on.
 */
import type { Compute } from "./plan.ts";

/** Returns the name of an operand of the nth tensor of a list, which counts from 0. */
export const listedName = (name: string, n: number): string => (n === 0 ? name : `${name}.${n}`);

/** Returns the name and the tensor of a listed name. */
export function tensorOf(listed: string): { readonly name: string; readonly n: number } {
  const [name = "", n] = listed.split(".");
  return { name, n: n === undefined ? 0 : Number(n) };
}

/** Returns whether an operand belongs to the first tensor of a list, or to all. */
export const isOfFirst = (listed: string): boolean => !listed.includes(".");

/** Returns an instruction of a list as one instruction for each tensor; any other instruction as itself. */
export function membersOf(i: Compute): Compute[] {
  const { tensors, ...rest } = i;
  if (tensors === undefined) return [i];
  const [reads, writes] = [i.reads, i.writes].map((operands) => {
    const names = Object.keys(operands).filter(isOfFirst);
    return (n: number): Record<string, string> =>
      Object.fromEntries(names.map((name) => [name, operands[listedName(name, n)] ?? operands[name] ?? ""]));
  }) as [(n: number) => Record<string, string>, (n: number) => Record<string, string>];
  const accumulates = i.accumulates?.filter(isOfFirst);
  return Array.from({ length: tensors }, (_, n) => ({ ...rest, reads: reads(n), writes: writes(n), ...(accumulates && { accumulates }) }));
}
