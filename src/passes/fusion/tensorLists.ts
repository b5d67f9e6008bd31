/**
 * Fusion of the optimizer step: instructions that follow one another and run one elementwise op, or one sum to a scalar, on different tensors
 * become one instruction on a list of tensors (schemas/tensorLists.ts). A step of a small model otherwise consists of hundreds of launches of a
 * few microseconds. Results of elementwise ops keep their bits; a sum adds in another order, which is fixed.
 */
import type { Buffer, Compute, Instruction, Program } from "../../../schemas/plan.ts";
import { listedName } from "../../../schemas/tensorLists.ts";
import { isFormulaOp, ops } from "../../ops/index.ts";
import type { AnyOp } from "../../ops/op.ts";

/** Instructions that one instruction replaces. */
interface Group {
  readonly key: string;
  readonly members: Compute[];
}
type Buffers = ReadonlyMap<string, Buffer>;

/**
 * Bytes of kernel parameters that every architecture and every version of CUDA accepts, without what a kernel takes beside addresses of tensors.
 * Longer lists are several instructions: a launch with so many tensors is long enough.
 */
const PARAMETER_BYTES = 4096 - 128;
const ADDRESS_BYTES = 8;

/** Returns a step block in which one instruction on a list of tensors replaces several instructions. */
export function joinTensors(step: readonly Instruction[], program: Pick<Program, "buffers">): Instruction[] {
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const numbers = new Map<string, number>();
  const name = (op: string): string => {
    const n = numbers.get(op) ?? 0;
    numbers.set(op, n + 1);
    return `tensors.${op}${n === 0 ? "" : `.${n}`}`;
  };
  const out: Instruction[] = [];
  let run: Compute[] = [];
  const flush = (): void => {
    // most runs between collectives are of one instruction
    if (run.length === 1) out.push(...run);
    else for (const { members } of groupsOf(run, buffers)) for (const part of partsOf(members)) out.push(joined(part, name));
    run = [];
  };
  for (const i of step) {
    const isListed = i.kind === "compute" && isJoinable(i, buffers);
    // what waits for a collective stays behind what does not
    if (!isListed || i.waits) flush();
    if (isListed) run.push(i);
    else out.push(i);
  }
  flush();
  return out;
}

/** Returns the operands of an op that are lists: those of any shape. */
const listed = ({ inputs, outputs }: Pick<AnyOp, "inputs" | "outputs">): string[] =>
  [...inputs, ...outputs].filter((o) => o.any).map((o) => o.name);

/** Returns whether an instruction may be one of a list: its op has a formula, and operands of any shape or of one element. */
function isJoinable(i: Compute, buffers: Buffers): boolean {
  const op = ops[i.op];
  const operands = [...op.inputs, ...op.outputs];
  if (!isFormulaOp(op) || !operands.some((o) => o.any) || !operands.every((o) => o.any || o.dimSpecs.length === 0)) return false;
  if (i.blocks || i.ringOffset || i.rows !== undefined || op.runtimeAttrs) return false;
  // a scalar that all tensors share is only added to
  if (op.outputs.some((o) => !o.any && !i.accumulates?.includes(o.name))) return false;
  // kernels load vectors from the begin of a tensor, and a part may begin within one
  return [...Object.values(i.reads), ...Object.values(i.writes)].map((id) => buffers.get(id)).every((b) => b?.ragged === 0 && !b.part);
}

/** The last groups that read a buffer, write it, and add to it. */
interface Uses {
  read: number;
  written: number;
  added: number;
}

/** Returns the instructions of a run as groups, in an order in which each reads what it read before. */
function groupsOf(run: readonly Compute[], buffers: Buffers): Group[] {
  const groups: Group[] = [];
  const numbers = new Map<string, number>();
  const uses = new Map<string, Uses>();
  const usesOf = (id: string): Uses => {
    const b = buffers.get(id);
    const memory = b?.within ?? b?.part?.of ?? id;
    const known = uses.get(memory) ?? { read: -1, written: -1, added: -1 };
    uses.set(memory, known);
    return known;
  };
  for (const i of run) {
    const key = keyOf(i, buffers);
    const reads = Object.values(i.reads).map(usesOf);
    const [written, added] = isSum(ops[i.op]) ? [[], Object.values(i.writes).map(usesOf)] : [Object.values(i.writes).map(usesOf), []];
    // sums may be added in any order
    const last = Math.max(
      ...reads.map((u) => Math.max(u.written, u.added)),
      ...written.map((u) => Math.max(u.read, u.written, u.added)),
      ...added.map((u) => Math.max(u.read, u.written)),
    );
    const own = numbers.get(key) ?? -1;
    const number = own > last ? own : groups.length;
    if (number === groups.length) groups.push({ key, members: [] });
    groups[number]?.members.push(i);
    numbers.set(key, number);
    for (const u of reads) u.read = Math.max(u.read, number);
    for (const u of written) u.written = Math.max(u.written, number);
    for (const u of added) u.added = Math.max(u.added, number);
  }
  return groups;
}

/** Returns whether an op adds all elements of a tensor to a scalar. */
const isSum = ({ outputs }: Pick<AnyOp, "outputs">): boolean => outputs.every((o) => !o.any);

/** Returns what the instructions of a list have in common: op, attributes, types and scalars. */
function keyOf(i: Compute, buffers: Buffers): string {
  const any = new Set(listed(ops[i.op]));
  const operands = Object.entries({ ...i.reads, ...i.writes }).map(([name, id]) => [name, any.has(name) ? buffers.get(id)?.dtype : id]);
  return JSON.stringify([i.op, i.attrs, i.accumulates, i.only, operands]);
}

/** Returns the members of a group in parts of about equal length whose addresses fit the parameters of a kernel. */
function partsOf(members: readonly Compute[]): Compute[][] {
  const [first] = members;
  const most = first ? Math.floor(PARAMETER_BYTES / (ADDRESS_BYTES * listed(ops[first.op]).length)) : 1;
  const parts = Math.ceil(members.length / most);
  return Array.from({ length: parts }, (_, n) =>
    members.slice(Math.floor((n * members.length) / parts), Math.floor(((n + 1) * members.length) / parts)),
  );
}

/** Returns the instruction of a list, with the name of its op; the instruction itself if it is the only one. */
function joined(members: readonly Compute[], name: (op: string) => string): Instruction {
  const [first, ...more] = members as readonly [Compute, ...Compute[]];
  if (more.length === 0) return first;
  const any = new Set(listed(ops[first.op]));
  const all = (of: "reads" | "writes"): Record<string, string> => ({
    ...first[of],
    ...Object.fromEntries(
      more.flatMap((m, n) => Object.entries(m[of]).flatMap(([o, id]) => (any.has(o) ? [[listedName(o, n + 1), id]] : []))),
    ),
  });
  const accumulates = first.accumulates && [
    ...first.accumulates,
    ...more.flatMap((_, n) => (first.accumulates ?? []).filter((o) => any.has(o)).map((o) => listedName(o, n + 1))),
  ];
  return {
    ...first,
    id: name(first.op),
    tensors: members.length,
    reads: all("reads"),
    writes: all("writes"),
    ...(accumulates && { accumulates }),
  };
}
