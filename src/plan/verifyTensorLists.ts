/** Checks of instructions on lists of tensors (schemas/tensorLists.ts). */
import type { Buffer, Compute } from "../../schemas/plan.ts";
import { listedName, tensorOf } from "../../schemas/tensorLists.ts";
import { ops } from "../ops/index.ts";

type Buffers = { get(id: string): Pick<Buffer, "dtype"> | undefined };

/** Returns the fault of the names and types of a list: each tensor has all operands that are lists, of one type. Undefined if there is none. */
export function faultOfList(i: Compute, tensors: number, buffers: Buffers): string | undefined {
  const { inputs, outputs } = ops[i.op];
  if (![...inputs, ...outputs].some((o) => o.any)) return `${i.op} has no operand that is a list of tensors`;
  for (const [operands, named] of [
    [inputs, i.reads],
    [outputs, i.writes],
  ] as const) {
    for (const listed in named) {
      const { name, n } = tensorOf(listed);
      const operand = operands.find((o) => o.name === name);
      if (!operand || listed !== listedName(name, n) || !(n < (operand.any ? tensors : 1))) return `unknown operand ${listed}`;
      const [own, first] = [named[listed] ?? "", named[name] ?? ""].map((id) => buffers.get(id)?.dtype);
      if (own !== first) return `${listed} is ${own}, and ${name} ${first}`;
    }
    for (const { name, any } of operands)
      for (let n = 1; any && n < tensors; n++)
        if (!Object.hasOwn(named, listedName(name, n))) return `${i.op} lacks its operand ${listedName(name, n)}`;
  }
  for (const name of i.accumulates ?? []) if (!Object.hasOwn(i.writes, name)) return `it accumulates ${name}, which it does not write`;
  return undefined;
}

/** Returns the fault of a list whose tensors depend on one another: a launch computes them in any order. Undefined if there is none. */
export function faultOfOrder(i: Compute): string | undefined {
  const written = new Set<string>();
  for (const id of Object.values(i.writes)) {
    if (written.has(id)) return `it writes ${id} for two tensors`;
    written.add(id);
  }
  const read = Object.values(i.reads).find((id) => written.has(id));
  return read === undefined ? undefined : `it reads ${read}, which it writes`;
}
