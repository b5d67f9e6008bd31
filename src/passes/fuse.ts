/**
 * Fusion: replaces instructions of a block by one that reads and writes less memory (src/ops/fused.ts). It runs after lowering, for targets
 * whose kernels include the fused ops, so neither the graph nor its sharding depends on the target.
 */
import { touchedBy } from "../../schemas/effects.ts";
import type { Buffer, Compute, Instruction, Program } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import type { FusedOpName } from "../ops/index.ts";
import { invariant } from "../ops/op.ts";

/** Returns the programs with fused instructions if the target has kernels for them, else the programs themselves. */
export const fuseFor = ({ fuses }: { readonly fuses?: true }, programs: Program[]): Program[] => (fuses ? programs.map(fuse) : programs);

/** Returns a program with fused instructions. Buffers that only passed between fused instructions are gone. */
function fuse(program: Program): Program {
  const uses = new BufferUses(program);
  const block = (list: readonly Instruction[]): Instruction[] => fuseSums(list, uses);
  const chunks = program.chunks.map((c) => ({ ...c, forward: block(c.forward), backward: block(c.backward), weights: block(c.weights) }));
  return { ...program, chunks, buffers: program.buffers.filter(({ id }) => uses.has(id)) };
}

/** The buffers of a program, and how many instructions touch each. */
class BufferUses {
  readonly #buffers: Map<string, Buffer>;
  readonly #counts = new Map<string, number>();

  constructor(program: Program) {
    this.#buffers = new Map(program.buffers.map((b) => [b.id, b]));
    for (const i of instructionsOf(program))
      for (const id of touchedBy(i, this.#buffers)) this.#counts.set(id, (this.#counts.get(id) ?? 0) + 1);
  }
  has(id: string): boolean {
    return this.#buffers.has(id);
  }
  get(id: string): Buffer {
    const found = this.#buffers.get(id);
    invariant(found !== undefined, () => `${id} is not a buffer`);
    return found;
  }
  /** Returns whether only the instruction that writes a buffer and one other touch it. */
  isBetweenTwo(id: string): boolean {
    return this.get(id).kind === "workspace" && this.#counts.get(id) === 2;
  }
  delete(id: string): void {
    this.#buffers.delete(id);
  }
}

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

/** Replaces sums of input gradients by one product over all their depths, whose sum stays in registers. */
function fuseSums(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  const producers = new Map<string, Compute>();
  const fused = new Set<Instruction>();
  const out: Instruction[] = [];
  for (const i of list) {
    const sum = i.kind === "compute" && i.op === "add" ? sumOf(i, producers, uses) : undefined;
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
  const shared = (i: Compute) => JSON.stringify(dims.map((dim) => i.dims[dim]));
  if (op === undefined || !isUniform || shared(first) !== shared(second)) return undefined;
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
