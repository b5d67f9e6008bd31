/** Checks of sizes in a program: buffers, operands of instructions, inputs and metrics. */

import { bytesOf } from "../../schemas/dtypes.ts";
import { pairsOf } from "../../schemas/effects.ts";
import type { Job } from "../../schemas/job.ts";
import type { OpName } from "../../schemas/opNames.ts";
import type { Buffer, Collective, Compute, InputSource, Program, Transfer } from "../../schemas/plan.ts";
import { inputName, instructionsOf } from "../../schemas/program.ts";
import { elementsOf, shardCount, subAxisOf } from "../../schemas/sharding.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import { bytesSent } from "../analysis/cost.ts";
import { bufferForm, computeForm } from "../analysis/instructionForms.ts";
import { ops } from "../ops/index.ts";
import { type AnyOp, expandLike, invariant, type Operand, rowsOperandOf } from "../ops/op.ts";
import { dimSize } from "../ops/signature.ts";
import { sizeOf } from "../passes/memory.ts";
import type { Mesh } from "../passes/mesh.ts";
import type { Repeats } from "../repeats.ts";
import { faultOfList, faultOfOrder } from "./verifyTensorLists.ts";

type Buffers = ReadonlyMap<string, Buffer>;
/** The rest of the plan. */
interface PlanContext {
  readonly job: Job;
  readonly mesh: Mesh;
  /** The programs of all stages. */
  readonly stages: readonly Program[];
  /** What was checked before, by form: buffers with their numbers, and compute instructions. */
  readonly checked: { readonly buffers: Repeats<number>; readonly instructions: Repeats<true> };
}
/** The program under check and the rest of the plan. */
interface Context extends PlanContext {
  readonly who: string;
  readonly program: Program;
  readonly buffers: Buffers;
}

type Must = (ok: boolean, what: () => string) => void;

/** The largest buffer in bytes: a pebibyte, far below the limit of exact integers. */
const LARGEST = 2 ** 50;
/** The largest number of dims of a tensor; rankc itself uses 4. */
const MOST_DIMS = 8;

/** Throws a BrokenInvariant that names stage and buffer or instruction if sizes in a program do not fit together. */
export function verifyShapes(program: Program, plan: PlanContext): void {
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const context: Context = { ...plan, who: `stage ${program.stage}`, program, buffers };
  invariant(buffers.size === program.buffers.length, () => `${context.who}: two buffers have the same id`);
  const before = new Set<string>();
  const { checked } = plan;
  const forms = new Map<string, number>();
  for (const b of program.buffers) {
    const must = (fault: string | undefined): void => {
      if (fault !== undefined) invariant(false, `${context.who}: buffer ${b.id}: ${fault}`);
    };
    const number = checked.buffers.of(bufferForm(b), () => {
      must(faultOfSizes(b, plan.mesh));
      return checked.buffers.forms;
    });
    forms.set(b.id, number);
    must(faultOfBuffer(b, context));
    // the outer buffer must come first, so `within` has no cycles
    const outer = b.within === undefined ? undefined : buffers.get(b.within);
    invariant(
      b.within === undefined || (outer !== undefined && before.has(b.within) && outer.kind === b.kind && sizeOf(outer) >= sizeOf(b)),
      () => `${context.who}: ${b.id} cannot lie within ${b.within}`,
    );
    must(faultOfPart(b, buffers));
    before.add(b.id);
  }
  const formOf = (id: string): number | undefined => forms.get(id);
  for (const i of instructionsOf(program)) {
    const must = (fault: string | undefined): void => {
      if (fault !== undefined) invariant(false, `${context.who}: ${i.id}: ${fault}`);
    };
    if (i.kind !== "compute") must(i.kind === "collective" ? faultOfCollective(i, context) : faultOfTransfer(i, context));
    else {
      if (i.tensors !== undefined) must(faultOfList(i, i.tensors, buffers) ?? faultOfOrder(i));
      for (const one of membersOf(i))
        checked.instructions.of(`${indexState(one, buffers)} ${computeForm(one, formOf)}`, () => {
          must(faultOfCompute(one, context));
          return true;
        });
    }
  }
  verifyParameters(context);
  verifyInputs(context);
  verifyMetrics(context);
}

function bufferNamed(id: string, by: string, { who, buffers }: Context): Buffer {
  const found = buffers.get(id);
  invariant(found !== undefined, () => `${who}: ${by} names ${id}, which is not a buffer`);
  return found;
}

/** Returns whether these are sub-axes of the mesh without repetition. */
function areSubAxes(fs: readonly number[], mesh: Mesh): boolean {
  return fs.every((f, at) => f < mesh.subAxes.length && fs.indexOf(f) === at);
}
const areSame = (a: readonly number[], b: readonly number[]): boolean => a.length === b.length && a.every((n, i) => n === b[i]);

/** Returns the fault of what a form of buffers states; undefined if there is none. */
function faultOfSizes(b: Buffer, mesh: Mesh): string | undefined {
  const { ragged, sizes, shape, shardedBy } = b;
  if (ragged !== 0 && ragged !== 3) return `${ragged} ragged dims`;
  if (sizes.length > MOST_DIMS) return `${sizes.length} dims, and a tensor has ${MOST_DIMS} at most`;
  if (shardedBy.length !== sizes.length) return `shardedBy has ${shardedBy.length} entries for ${sizes.length} dims`;
  if (shape.length !== sizes.length - Math.max(0, ragged - 1)) return `the shape [${shape}] does not fit ${sizes.length} dims`;
  if (!areSubAxes(shardedBy.flat(), mesh)) return UNKNOWN_SUB_AXES;
  if (elementsOf(sizes) * bytesOf[b.dtype] > LARGEST || sizeOf(b) > LARGEST) return "it is too large";
  for (let slot = ragged; slot < sizes.length; slot++) {
    const [local, cut] = [shape[ragged ? slot - 2 : slot]!, shardCount(mesh, shardedBy[slot]!)];
    if (local * cut !== sizes[slot]) return `${sizes[slot]} elements over ${cut} ranks are not ${local}`;
  }
  return undefined;
}
const UNKNOWN_SUB_AXES = "its sub-axes are unknown or repeated";

/** Returns the fault of what a buffer has beyond its form; undefined if there is none. */
function faultOfBuffer({ id, ragged, shape, partial, kind, chunk, fanout, rows }: Buffer, context: Context): string | undefined {
  const { mesh, program, buffers } = context;
  if (id === "__proto__") return "this name is reserved";
  if (partial && !areSubAxes(partial, mesh)) return UNKNOWN_SUB_AXES;
  if (chunk !== undefined && (chunk >= program.chunks.length || kind !== "activation")) return `there is no chunk ${chunk}`;
  if (ragged > 0 && (fanout === undefined || rows === undefined)) return "ragged rows without a fanout or an index";
  if (rows === undefined) return undefined;
  const index = buffers.get(rows);
  if (index?.dtype !== "i32" || index.shape.length !== 1 || index.rows !== undefined || index.shape[0]! <= 3 * (shape[0] ?? 0))
    return `${rows} is not an index of its rows`;
  return undefined;
}

/** Returns the fault of a part of a buffer; undefined if there is none. */
function faultOfPart(b: Buffer, buffers: ReadonlyMap<string, Buffer>): string | undefined {
  if (!b.part) return undefined;
  const outer = buffers.get(b.part.of);
  const isAlike = outer?.kind === b.kind && outer.dtype === b.dtype && outer.chunk === b.chunk && !outer.part;
  const isInside = outer && b.part.at + elementsOf(b.shape) <= elementsOf(outer.shape);
  return isAlike && isInside && !b.within && !outer.within && b.ragged + outer.ragged === 0 ? undefined : `it is no part of ${b.part.of}`;
}

type Dims = Readonly<Record<string, number>>;

/** Returns the fault of a compute instruction; undefined if there is none. */
function faultOfCompute(i: Compute, context: Context): string | undefined {
  const { mesh, buffers } = context;
  const op = ops[i.op];
  const d: Record<string, number> = { ...i.attrs };
  for (const dim in i.dims) {
    const [size, cut] = i.dims[dim]!;
    if (!areSubAxes(cut, mesh)) return `${dim} is sharded by unknown or repeated sub-axes ${cut}`;
    d[dim] = size / shardCount(mesh, cut);
    if (!Number.isInteger(d[dim])) return `${dim} of ${size} elements is not sharded evenly`;
  }
  if (
    !areSubAxes(
      (i.blocks ?? []).map(({ subAxis }) => subAxis),
      mesh,
    )
  )
    return "its blocks lie along unknown or repeated sub-axes";
  for (const dim in i.ringOffset) if (!Object.hasOwn(i.dims, dim)) return `its ring offset names the unknown dim ${dim}`;
  const like = likeOf(op, i, buffers);
  for (const [at, n] of (like?.sizes ?? []).entries()) d[`#${at}`] = n / shardCount(mesh, like?.shardedBy[at] ?? []);
  const { inputs, outputs } = operandsOf(op, like);
  const fault = faultOfOperands(inputs, i.reads, d, buffers) ?? faultOfOperands(outputs, i.writes, d, buffers);
  if (fault) return fault;
  for (const { name } of inputs) if (!Object.hasOwn(i.reads, name)) return `${i.op} lacks its operand ${name}`;
  for (const name of i.accumulates ?? []) if (!Object.hasOwn(i.writes, name)) return `it accumulates ${name}, which it does not write`;
  const index = indexState(i, buffers);
  if (index !== "none" && !op.rows) return `${i.op} does not write an index`;
  if (index === "other") return `it writes the index ${i.rows}, which is not that of its output`;
  const rowsOf = rowsOperandOf(op);
  if (i.rows_of !== rowsOf) return `it computes on the rows of ${i.rows_of ?? "any operand"}, and ${i.op} on those of ${rowsOf ?? "all"}`;
  return faultOfCounts(i, d, context);
}

/** Returns whether an instruction writes an index of rows, and whether that is the index of its first output. */
function indexState({ rows, writes }: Compute, buffers: Buffers): "none" | "own" | "other" {
  if (rows === undefined) return "none";
  return buffers.get(Object.values(writes)[0] ?? "")?.rows === rows ? "own" : "other";
}

/** Cache of operands, by op and number of dims. */
const expanded = new Map<string, Pick<AnyOp, "inputs" | "outputs">>();

/** Returns the buffer of the first operand that is written `...`. */
function likeOf(op: AnyOp, i: Compute, buffers: Buffers): Buffer | undefined {
  const any = op.inputs.find((o) => o.any) ?? op.outputs.find((o) => o.any);
  return any && buffers.get(i.reads[any.name] ?? i.writes[any.name] ?? "");
}

/** Returns the operands of an op, with `...` expanded to the dims of a buffer. */
function operandsOf(op: AnyOp, b: Buffer | undefined): Pick<AnyOp, "inputs" | "outputs"> {
  if (!b) return op;
  const key = `${op.name} ${b.sizes.length} ${b.ragged}`;
  const found = expanded.get(key) ?? expandLike(op, { dimSpecs: b.sizes.length, ragged: b.ragged });
  expanded.set(key, found);
  return found;
}

/** Returns the fault of operands: unknown to the op, or of the wrong local size. Optional outputs may be absent. */
function faultOfOperands(
  operands: readonly Operand[],
  named: Readonly<Record<string, string>>,
  d: Dims,
  buffers: Buffers,
): string | undefined {
  for (const name in named) {
    const o = operands.find((o) => o.name === name);
    if (!o) return `unknown operand ${name}`;
    const b = buffers.get(named[name]!);
    if (!b) return `it names ${named[name]}, which is not a buffer`;
    // transport ops treat a buffer of any shape as one dim
    const flat = o.dimSpecs.length === 1 && o.ragged === 0;
    const have = flat ? [elementsOf(b.shape)] : b.shape.slice(o.ragged ? 1 : 0);
    const want = o.dimSpecs.slice(o.ragged).map((s) => dimSize(s, d));
    if (!areSame(have, want) || (!flat && b.ragged !== o.ragged)) return `${name} is [${want}], and ${b.id} [${have}]`;
  }
  return undefined;
}

/** Attributes that bound loops, and their largest values; `experts` counts all ranks. */
const counts: Readonly<Record<string, (experts: number, attrs: Dims) => number>> = {
  k: (experts) => experts,
  groups: (experts) => experts,
  group_top_k: (_, { groups = 1 }) => groups,
  group_scores: (experts) => experts,
  most: () => 1e6,
};

/** Returns the fault of the attributes that loops and memory offsets depend on. */
function faultOfCounts(i: Compute, d: Dims, { mesh, buffers }: Context): string | undefined {
  for (const [name, mostOf] of Object.entries(counts)) {
    const value = i.attrs[name];
    if (value === undefined) continue;
    const most = mostOf(i.dims.E?.[0] ?? 0, i.attrs);
    if (!Number.isInteger(value) || value < 0 || value > most) return `${name} is ${value}, the largest possible value is ${most}`;
  }
  const lastBlock = (i.blocks ?? []).reduce((sum, { subAxis, stride }) => sum + (subAxisOf(mesh, subAxis).size - 1) * stride, 0);
  return offsetChecks[i.op]?.(d, { lastBlock, size: (name) => sizeIn(buffers, i.reads[name] ?? i.writes[name]) });
}
const sizeIn = (buffers: Buffers, id = ""): number => elementsOf(buffers.get(id)?.shape ?? [0]);

/** What an instruction may address. */
interface Extent {
  /** The first element of the last block of the input; 0 if it has no blocks. */
  readonly lastBlock: number;
  /** Returns the elements of an operand. */
  readonly size: (operand: string) => number;
}
/** Per op that computes memory offsets from attributes, a check of these. */
const offsetChecks: Partial<Record<OpName, (d: Dims, extent: Extent) => string | undefined>> = {
  arrange: faultOfArrange,
  expert_loads: ({ row = 0, T = 0 }) => (Number.isInteger(row) && row >= 0 && row < T ? undefined : `row ${row} of ${T} layers`),
  take_rows: ({ N = 0, width = 0 }, { size }) => (N * width === size("y") ? undefined : `${N} rows of ${width} are not ${size("y")}`),
  split_rows: ({ cap = 0 }, { size }) =>
    size("lists") % (1 + 3 * cap) === 0 ? undefined : `${size("lists")} elements are not lists of ${cap} rows`,
  merge_rows: ({ count = 0, length = 0, cap = 0, bound = 0, E = 0 }, { lastBlock, size }) =>
    lastBlock + count * Math.max(1, length) > size("lists") || 1 + 3 * cap > length
      ? `${size("lists")} do not hold ${count} lists of ${cap} rows`
      : 1 + 3 * bound + E + 1 !== size("index")
        ? `${size("index")} elements are not an index of ${bound} rows of ${E} experts`
        : undefined,
};

/** Checks that `arrange` writes each element of y once and reads inside x. */
function faultOfArrange(d: Dims, { lastBlock }: Extent): string | undefined {
  let [elements, last, n] = [1, 0, 0];
  for (; d[`n${n}`] !== undefined; n++) {
    const [size = -1, stride = -1] = [d[`n${n}`], d[`s${n}`]];
    if (!Number.isInteger(size) || size < 1 || !Number.isInteger(stride) || stride < 0) return `size ${size} at stride ${stride}`;
    elements *= size;
    last += (size - 1) * stride;
  }
  last += lastBlock;
  return n > 0 && elements === d.O && last < d.I! ? undefined : `it reads element ${last} of ${d.I}, and writes ${elements} of ${d.O}`;
}

function faultOfCollective(i: Collective, { mesh, buffers }: Context): string | undefined {
  const { how, world, subAxes, bytes } = i;
  if (!areSubAxes(subAxes, mesh)) return `it runs over unknown or repeated sub-axes ${subAxes}`;
  let sent = 0;
  for (const { from, to } of pairsOf(i)) {
    const [a, b] = [buffers.get(from), buffers.get(to)];
    if (!a || !b) return `it names ${a ? to : from}, which is not a buffer`;
    sent += bytesSent(how, world ? mesh.world : shardCount(mesh, subAxes), sizeOf(a), sizeOf(b));
  }
  return bytes === sent ? undefined : `it sends ${sent} bytes, the plan states ${bytes}`;
}

function faultOfTransfer({ buffer, bytes }: Transfer, { buffers }: Context): string | undefined {
  const b = buffers.get(buffer);
  if (!b) return `it names ${buffer}, which is not a buffer`;
  return bytes === sizeOf(b) ? undefined : `it has ${bytes} bytes, and ${buffer} ${sizeOf(b)}`;
}

function verifyParameters(context: Context): void {
  const { who, program, stages } = context;
  const names = new Set<string>();
  for (const p of program.parameters) {
    const must: Must = (ok, what) => invariant(ok, () => `${who}: parameter ${p.name}: ${what()}`);
    must(!names.has(p.name), () => "the name is repeated");
    names.add(p.name);
    const [own, master] = [p.buffer, p.master].map((id) => bufferNamed(id, p.name, context)) as [Buffer, Buffer];
    bufferNamed(p.gradient, p.name, context);
    must(own.kind === "parameter" && ["parameter", "optimizer"].includes(master.kind), () => "its buffers have the wrong kinds");
    must(areSame(own.sizes, master.sizes), () => `it has sizes [${own.sizes}], its master copy [${master.sizes}]`);
    must(
      p.tied_to === undefined || stages.some((s) => s.stage !== program.stage && s.parameters.some((q) => q.name === p.tied_to)),
      () => `no other stage has the owner ${p.tied_to}`,
    );
  }
}

/** Per source, the elements of an input: one per token or per sequence of a microbatch, or a scalar. */
const inputSizes: Readonly<Record<InputSource, "token" | "sequence" | "scalar">> = {
  ...{ ids: "token", labels: "token", weights: "token", positions: "token", documents: "token", sources: "token", sample: "sequence" },
  ...{
    one: "scalar",
    mtp_coeff: "scalar",
    aux_weight: "scalar",
    lr: "scalar",
    step: "scalar",
    weight_decay: "scalar",
    loss_scale: "scalar",
  },
};

/** Checks the sizes of inputs: a scalar, one element per sequence, or one per token of a microbatch. */
function verifyInputs(context: Context): void {
  const { job, program } = context;
  const sequences = job.train.micro_batch * job.parallel.data;
  const elements = { token: sequences * job.model.seq, sequence: sequences, scalar: 1 };
  for (const input of program.inputs) {
    const name = inputName(input);
    const b = bufferNamed(input.buffer, `the input ${name}`, context);
    const kind = inputSizes[input.source];
    invariant(input.depth === undefined || kind === "token", () => `${context.who}: the input ${name} has no depth`);
    invariant(
      b.ragged === 0 && elementsOf(b.sizes) === elements[kind],
      () => `${context.who}: the input ${name} has ${elements[kind]} elements, and ${b.id} [${b.sizes}]`,
    );
  }
}

/** Checks that metrics and row counts are scalars, except the table of expert loads. */
function verifyMetrics({ who, program, buffers }: Context): void {
  const dimsOf = (id: string): number | undefined => buffers.get(id)?.shape.length;
  for (const [name, ids] of Object.entries(program.metrics))
    for (const id of ids) {
      const dims = name === "expert_loads" ? 2 : 0;
      invariant(dimsOf(id) === dims, () => `${who}: the metric ${name} has ${dims} dims, and ${id} ${dimsOf(id)}`);
    }
  for (const id of program.mtp_losses?.flat() ?? [])
    invariant(program.metrics.mtp_loss?.includes(id) === true, () => `${who}: ${id} is a loss of a depth, and not part of mtp_loss`);
  for (const { needed } of program.bounds) invariant(dimsOf(needed) === 0, () => `${who}: ${needed} is not a scalar`);
}
