/** Fusion of sums: input gradients of several products of one value, and the gradient of a norm with that of the residual stream. */
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { FusedOpName } from "../../ops/index.ts";
import type { BufferUses } from "./bufferUses.ts";

/** One addend of the gradient of the input of several products. */
interface Addend {
  readonly dy: string;
  readonly w: string;
  /** Size and sub-axes of the dim that is summed over. */
  readonly depth: Compute["dims"][string];
}

/** Per kind of product, the dims that its addends share, and the op of so many addends. */
const families: Readonly<
  Record<"gemm" | "grouped", { readonly dims: readonly string[]; readonly ops: Readonly<Record<number, FusedOpName>> }>
> = {
  gemm: { dims: ["B", "S", "K"], ops: { 2: "gemm_dgrad_pair", 3: "gemm_dgrad_triple" } },
  grouped: { dims: ["B", "S", "E", "K"], ops: { 2: "grouped_dgrad_pair" } },
};
/** The dims that the addends of a fused op are summed over. */
const depths = ["N", "F", "D"] as const;

type Family = keyof typeof families;
interface Gradient {
  readonly family: Family;
  readonly addends: readonly Addend[];
}

/** Returns the addends of an input gradient of a product, or of several products; undefined for any other instruction. */
function gradientOf(i: Compute): Gradient | undefined {
  const [, family, several] = /^(gemm|grouped)_dgrad(_pair|_triple)?$/.exec(i.op) ?? [];
  if (family === undefined || i.accumulates !== undefined || i.ringOffset !== undefined) return undefined;
  const names = several === undefined ? [["dy", "w", "N"] as const] : depths.map((dim, n) => [`dy${n + 1}`, `w${n + 1}`, dim] as const);
  const addends = names.flatMap(([dyName, wName, dim]) => {
    const [dy, w, depth] = [i.reads[dyName], i.reads[wName], i.dims[dim]];
    return dy !== undefined && w !== undefined && depth !== undefined ? [{ dy, w, depth }] : [];
  });
  return { family: family as Family, addends };
}

/** Replaces sums of input gradients by one product over all their depths, whose sum stays in registers, and adds in the gradient of a norm. */
export function fuseSums(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  const producers = new Map<string, Compute>();
  const fused = new Set<Instruction>();
  const out: Instruction[] = [];
  for (const i of list) {
    const sum = i.kind === "compute" && i.op === "add" ? (sumOf(i, producers, uses) ?? residualOf(i, producers, uses)) : undefined;
    if (sum) for (const part of sum.parts) fused.add(part);
    const next = sum?.instruction ?? i;
    if (next.kind === "compute" && next.writes.dx !== undefined) producers.set(next.writes.dx, next);
    out.push(next);
  }
  return out.filter((i) => !fused.has(i));
}

/** Returns the product that replaces an addition and the instructions of its addends; undefined if they cannot be fused. */
function sumOf(add: Compute, producers: ReadonlyMap<string, Compute>, uses: BufferUses) {
  const { a, b } = add.reads;
  const { y } = add.writes;
  const [first, second] = [a, b].map((id) => (id !== undefined && uses.isBetweenTwo(id) ? producers.get(id) : undefined));
  if (a === undefined || b === undefined || y === undefined || !first || !second || add.accumulates) return undefined;
  const [of, more] = [gradientOf(first), gradientOf(second)];
  if (!of || !more || of.family !== more.family) return undefined;
  const { dims, ops } = families[of.family];
  const addends = [...of.addends, ...more.addends];
  const op = ops[addends.length];
  const { dtype } = uses.get(y);
  const isUniform = [a, b, ...addends.flatMap(({ dy, w }) => [dy, w])].every((id) => uses.get(id).dtype === dtype);
  // the fast kernels copy rows in pieces of 16 bytes; one narrow addend, such as that of a gate with one column, would take them from the others
  const aligned = addends.filter(({ dy }) => (uses.get(dy).shape.at(-1) ?? 0) % 8 === 0).length;
  const isMixed = aligned > 0 && aligned < addends.length;
  const shared = (i: Compute) => JSON.stringify(dims.map((dim) => i.dims[dim]));
  if (op === undefined || !isUniform || isMixed || shared(first) !== shared(second)) return undefined;
  for (const id of [a, b]) uses.delete(id);
  const instruction: Compute = {
    ...{ kind: "compute", id: add.id, op, kernel: "", attrs: {}, writes: { dx: y } },
    reads: Object.fromEntries(addends.flatMap(({ dy, w }, n) => [[`dy${n + 1}`, dy] as const, [`w${n + 1}`, w] as const])),
    dims: {
      ...Object.fromEntries(dims.flatMap((dim) => (first.dims[dim] ? [[dim, first.dims[dim]] as const] : []))),
      ...Object.fromEntries(addends.map(({ depth }, n) => [depths[n] ?? "", depth] as const)),
    },
  };
  return { instruction, parts: [first, second] };
}

/** Returns the gradient of a norm that adds the other addend; undefined if no addend is the gradient of a norm alone. */
function residualOf(add: Compute, producers: ReadonlyMap<string, Compute>, uses: BufferUses) {
  const { a, b } = add.reads;
  const { y } = add.writes;
  if (a === undefined || b === undefined || y === undefined || a === b || add.accumulates) return undefined;
  for (const [dx, z] of [
    [b, a],
    [a, b],
  ] as const) {
    const norm = uses.isBetweenTwo(dx) ? producers.get(dx) : undefined;
    if (norm?.op !== "rmsnorm_grad" || [dx, z].some((id) => uses.get(id).dtype !== uses.get(y).dtype)) continue;
    uses.delete(dx);
    const instruction: Compute = {
      ...norm,
      id: add.id,
      op: "rmsnorm_grad_add",
      reads: { ...norm.reads, z },
      writes: { ...norm.writes, dx: y },
    };
    return { instruction, parts: [norm] };
  }
  return undefined;
}
