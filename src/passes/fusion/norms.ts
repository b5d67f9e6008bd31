/** Fusion of norms with the sums that they read: of the residual stream forward, of gradients backward. */
import { readsOf, writesOf } from "../../../schemas/effects.ts";
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { FusedOpName } from "../../ops/index.ts";
import type { BufferUses } from "./bufferUses.ts";

/** The operands of a sum in the order in which they are added, and the instructions that add them. */
interface Sum {
  readonly addends: readonly string[];
  readonly parts: readonly Compute[];
}
/** Sums by the buffer that holds them. */
type Sums = Map<string, Compute>;

/** Replaces a sum and the norm that follows it by one instruction, also where the sum is a sum of a sum. Forward reads the sum later. */
export function fuseNormSums(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  const ops: Readonly<Record<number, FusedOpName>> = { 2: "rmsnorm_sum", 3: "rmsnorm_sum_triple" };
  return replaced(list, uses, (i, sums) => {
    const { x } = i.reads;
    if (i.op !== "rmsnorm" || x === undefined) return undefined;
    const sum = sumOf(x, sums, uses);
    const op = ops[sum?.addends.length ?? 0];
    if (!sum || op === undefined) return undefined;
    const { x: _, ...reads } = i.reads;
    const named = Object.fromEntries(sum.addends.map((id, n) => [`x${n + 1}`, id]));
    return { sum, by: { ...i, op, reads: { ...named, ...reads }, writes: { sum: x, ...i.writes } } };
  });
}

/** Replaces a sum of gradients that only the gradient of a norm reads by one instruction with it. */
export function fuseSlopeSums(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  const ops: Readonly<Record<number, FusedOpName>> = { 2: "rmsnorm_grad_add_pair", 3: "rmsnorm_grad_add_triple" };
  return replaced(list, uses, (i, sums) => {
    const { dy } = i.reads;
    if (i.op !== "rmsnorm_grad_add" || dy === undefined || !uses.isBetweenTwo(dy)) return undefined;
    const sum = sumOf(dy, sums, uses);
    const op = ops[sum?.addends.length ?? 0];
    if (!sum || op === undefined) return undefined;
    const { dy: _, ...reads } = i.reads;
    uses.delete(dy);
    return { sum, by: { ...i, op, reads: { ...reads, ...Object.fromEntries(sum.addends.map((id, n) => [`dy${n + 1}`, id])) } } };
  });
}

/** Returns the list in which instructions and the sums that they read are replaced. */
function replaced(
  list: readonly Instruction[],
  uses: BufferUses,
  fuse: (i: Compute, sums: Sums) => { readonly sum: Sum; readonly by: Compute } | undefined,
): Instruction[] {
  // sums that nothing has read, and whose operands nothing has written since
  const sums: Sums = new Map();
  const gone = new Set<Instruction>();
  const out: Instruction[] = [];
  for (const i of list) {
    const found = i.kind === "compute" ? fuse(i, sums) : undefined;
    for (const part of found?.sum.parts ?? []) gone.add(part);
    out.push(found?.by ?? i);
    forget(i, sums, uses);
    const { y } = i.kind === "compute" ? i.writes : {};
    if (i.kind === "compute" && i.op === "add" && y !== undefined && !i.accumulates) sums.set(y, i);
  }
  return out.filter((i) => !gone.has(i));
}

/** Removes sums that an instruction reads, unless it alone reads them and adds to them, and those with operands that it writes. */
function forget(i: Instruction, sums: Sums, uses: BufferUses): void {
  const isAdd = i.kind === "compute" && i.op === "add";
  for (const id of readsOf(i)) if (!isAdd || !uses.isBetweenTwo(id)) sums.delete(id);
  const written = new Set(writesOf(i, { get: () => undefined }));
  for (const [y, { reads }] of sums) if (written.has(y) || Object.values(reads).some((id) => written.has(id))) sums.delete(y);
}

/** Returns the sum that a buffer holds: of two operands, or of three if only this sum reads the sum that is one of them. */
function sumOf(id: string, sums: Sums, uses: BufferUses): Sum | undefined {
  const outer = sums.get(id);
  const { a, b } = outer?.reads ?? {};
  if (!outer || a === undefined || b === undefined) return undefined;
  const { dtype } = uses.get(id);
  const isUniform = (ids: readonly string[]) => ids.every((x) => uses.get(x).dtype === dtype);
  for (const [inner, other] of [
    [a, b],
    [b, a],
  ] as const) {
    const nested = uses.isBetweenTwo(inner) ? sums.get(inner) : undefined;
    const { a: first, b: second } = nested?.reads ?? {};
    if (!nested || first === undefined || second === undefined || !isUniform([first, second, inner, other])) continue;
    uses.delete(inner);
    return { addends: [first, second, other], parts: [nested, outer] };
  }
  return isUniform([a, b]) ? { addends: [a, b], parts: [outer] } : undefined;
}
