/** verifyShapes: what a program says of sizes fits together: buffers, the operands of its instructions, what the host fills and reads. */
import type { Job } from "../../schemas/job.ts";
import type { Buffer, Collective, Compute, Program, Transfer } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { bytesOf, elementsOf, shardCount } from "../../schemas/sharding.ts";
import { bytesSent } from "../analysis/cost.ts";
import { ops } from "../ops/index.ts";
import { type AnyOp, dimSize, expandLike, invariant, type Operand } from "../ops/op.ts";
import { sizeOf } from "../passes/memory.ts";
import type { Mesh } from "../passes/mesh.ts";

type Buffers = ReadonlyMap<string, Buffer>;
interface Around {
  readonly job: Job;
  readonly mesh: Mesh;
  /** The programs of all stages. */
  readonly stages: readonly Program[];
}
interface Known extends Around {
  readonly who: string;
  readonly program: Program;
  readonly buffers: Buffers;
}

type Must = (ok: boolean, what: () => string) => void;

/** Bytes that a plan may give to one buffer: a pebibyte, far from where integers lose digits. */
const LARGEST = 2 ** 50;
/** Dims that a tensor may have; rankc's have 4 at most. */
const MOST_SLOTS = 8;

/** Throws a BrokenInvariant that names the stage and the buffer or instruction. */
export function verifyShapes(program: Program, around: Around): void {
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const known: Known = { ...around, who: `stage ${program.stage}`, program, buffers };
  invariant(buffers.size === program.buffers.length, () => `${known.who}: two buffers have one name`);
  const before = new Set<string>();
  for (const b of program.buffers) {
    const fault = faultOfBuffer(b, known);
    if (fault !== undefined) invariant(false, `${known.who}: buffer ${b.id}: ${fault}`);
    // a buffer lies within one that stands before it: so there are no cycles
    const outer = b.within === undefined ? undefined : buffers.get(b.within);
    invariant(
      b.within === undefined || (outer !== undefined && before.has(b.within) && outer.kind === b.kind && sizeOf(outer) >= sizeOf(b)),
      () => `${known.who}: ${b.id} cannot lie within ${b.within}`,
    );
    before.add(b.id);
  }
  for (const i of instructionsOf(program)) {
    const fault =
      i.kind === "compute" ? faultOfCompute(i, known) : i.kind === "collective" ? faultOfMove(i, known) : faultOfTransfer(i, known);
    if (fault !== undefined) invariant(false, `${known.who}: ${i.id}: ${fault}`);
  }
  verifyParameters(known);
  verifyInputs(known);
  verifyReadings(known);
}

function bufferNamed(id: string, by: string, { who, buffers }: Known): Buffer {
  const found = buffers.get(id);
  invariant(found !== undefined, () => `${who}: ${by} names ${id}, which is no buffer`);
  return found;
}

/** Whether these are factors of the mesh, each once. */
function areFactors(fs: readonly number[], mesh: Mesh): boolean {
  for (let at = 0; at < fs.length; at++) if (fs[at]! >= mesh.subAxes.length || fs.indexOf(fs[at]!) !== at) return false;
  return true;
}
const areSame = (a: readonly number[], b: readonly number[]): boolean => a.length === b.length && a.every((n, i) => n === b[i]);

/** What is wrong with a buffer by itself; undefined where nothing is. */
function faultOfBuffer(b: Buffer, { mesh, program, buffers }: Known): string | undefined {
  const { id, ragged, sizes, shape, shardedBy, partial, kind, chunk, fanout, rows } = b;
  if (id === "__proto__") return "this name is reserved";
  if (ragged !== 0 && ragged !== 3) return `${ragged} ragged slots`;
  if (sizes.length > MOST_SLOTS) return `${sizes.length} dims, and a tensor has ${MOST_SLOTS} at most`;
  if (shardedBy.length !== sizes.length) return `${shardedBy.length} cuts of ${sizes.length} sizes`;
  if (shape.length !== sizes.length - Math.max(0, ragged - 1)) return `the shape [${shape}] is not of ${sizes.length} sizes`;
  if (!areFactors(shardedBy.flat(), mesh) || (partial && !areFactors(partial, mesh)))
    return "its factors are not those of the mesh, each once";
  if (elementsOf(sizes) * bytesOf[b.dtype] > LARGEST || sizeOf(b) > LARGEST) return "it is too large";
  for (let slot = ragged; slot < sizes.length; slot++) {
    const [local, cut] = [shape[ragged ? slot - 2 : slot]!, shardCount(mesh, shardedBy[slot]!)];
    if (local * cut !== sizes[slot]) return `${sizes[slot]} in ${cut} parts are not ${local}`;
  }
  if (chunk !== undefined && (chunk >= program.chunks.length || kind !== "activation")) return `there is no chunk ${chunk}`;
  if (ragged > 0 && (fanout === undefined || rows === undefined)) return "rows without a fanout or an index";
  if (rows === undefined) return undefined;
  const index = buffers.get(rows);
  if (index?.dtype !== "i32" || index.shape.length !== 1 || index.rows !== undefined || index.shape[0]! <= 3 * (shape[0] ?? 0))
    return `${rows} is no index of its rows`;
  return undefined;
}

type Dims = Readonly<Record<string, number>>;

/** What is wrong with the sizes of an instruction; undefined where nothing is. */
function faultOfCompute(i: Compute, { mesh, buffers }: Known): string | undefined {
  if (!Object.hasOwn(ops, i.op)) return `no op is named ${i.op}`;
  const op = ops[i.op]!;
  const d: Record<string, number> = { ...i.attrs };
  for (const dim in i.dims) {
    const [size, cut] = i.dims[dim]!;
    if (!areFactors(cut, mesh)) return `${dim} is cut by factors ${cut}`;
    d[dim] = size / shardCount(mesh, cut);
    if (!Number.isInteger(d[dim])) return `${dim} of ${size} is not cut evenly`;
  }
  for (const dim in i.ringOffset) if (!Object.hasOwn(i.dims, dim)) return `it has no dim ${dim} to be behind on`;
  const { inputs, outputs } = operandsOf(op, i, buffers);
  const fault = faultOfOperands(inputs, i.reads, d, buffers) ?? faultOfOperands(outputs, i.writes, d, buffers);
  if (fault) return fault;
  for (const { name } of inputs) if (!Object.hasOwn(i.reads, name)) return `${i.op} lacks its operand ${name}`;
  for (const name of i.accumulates ?? []) if (!Object.hasOwn(i.writes, name)) return `it keeps ${name}, which it does not write`;
  if (i.rows === undefined) return faultOfCounts(i, d, buffers);
  if (!op.rows) return `${i.op} makes no rows`;
  if (buffers.get(Object.values(i.writes)[0] ?? "")?.rows !== i.rows)
    return `it makes the rows ${i.rows}, which are not those of its output`;
  return faultOfCounts(i, d, buffers);
}

/** Operands met before, by op and by the slots that `...` stands for. */
const expanded = new Map<string, Pick<AnyOp, "inputs" | "outputs">>();

/** An op's operands, with `...` as many slots as the first such operand has. */
function operandsOf(op: AnyOp, i: Compute, buffers: Buffers): Pick<AnyOp, "inputs" | "outputs"> {
  const any = op.inputs.find((o) => o.any) ?? op.outputs.find((o) => o.any);
  const b = any && buffers.get(i.reads[any.name] ?? i.writes[any.name] ?? "");
  if (!b) return op;
  const key = `${op.name} ${b.sizes.length} ${b.ragged}`;
  const found = expanded.get(key) ?? expandLike(op, { dimSpecs: b.sizes.length, ragged: b.ragged });
  expanded.set(key, found);
  return found;
}

/** Operands are known to the op, and as large as the local dims say. Ops about messages leave some of their outputs out. */
function faultOfOperands(
  operands: readonly Operand[],
  named: Readonly<Record<string, string>>,
  d: Dims,
  buffers: Buffers,
): string | undefined {
  for (const name in named) {
    const o = operands.find((o) => o.name === name);
    if (!o) return `it has no operand ${name}`;
    const b = buffers.get(named[name]!);
    if (!b) return `it names ${named[name]}, which is no buffer`;
    // ops about messages take a buffer of any shape as one dim
    const flat = o.dimSpecs.length === 1 && o.ragged === 0;
    const have = flat ? [elementsOf(b.shape)] : b.shape.slice(o.ragged ? 1 : 0);
    const want = o.dimSpecs.slice(o.ragged).map((s) => dimSize(s, d));
    if (!areSame(have, want) || (!flat && b.ragged !== o.ragged)) return `${name} is [${want}], and ${b.id} [${have}]`;
  }
  return undefined;
}

/** Attributes that count what an op goes through, and what they may not exceed: of `experts` on all ranks. */
const counts: Readonly<Record<string, (experts: number, attrs: Dims) => number>> = {
  k: (experts) => experts,
  groups: (experts) => experts,
  group_top_k: (_, { groups = 1 }) => groups,
  group_scores: (experts) => experts,
  most: () => 1e6,
};

/** What is wrong with the attributes that loops and places depend on. */
function faultOfCounts(i: Compute, d: Dims, buffers: Buffers): string | undefined {
  for (const name in i.attrs) {
    if (!Object.hasOwn(counts, name)) continue;
    const [value, most] = [i.attrs[name]!, counts[name]!(i.dims.E?.[0] ?? 0, i.attrs)];
    if (!Number.isInteger(value) || value < 0 || value > most) return `${name} is ${value}, and at most ${most} is possible`;
  }
  return Object.hasOwn(places, i.op) ? places[i.op]!(d, i, (name) => sizeIn(buffers, i.reads[name] ?? i.writes[name])) : undefined;
}
const sizeIn = (buffers: Buffers, id = ""): number => elementsOf(buffers.get(id)?.shape ?? [0]);

/** Ops that compute places from attributes: what is wrong with these. `size` gives the elements of an operand. */
const places: Readonly<Record<string, (d: Dims, i: Compute, size: (name: string) => number) => string | undefined>> = {
  arrange: faultOfArrange,
  expert_loads: ({ row = 0, T = 0 }) => (Number.isInteger(row) && row >= 0 && row < T ? undefined : `row ${row} of ${T} layers`),
  take_rows: ({ N = 0, width = 0 }, _, size) => (N * width === size("y") ? undefined : `${N} rows of ${width} are not ${size("y")}`),
  split_rows: ({ cap = 0 }, _, size) => (size("lists") % (1 + 3 * cap) === 0 ? undefined : `${size("lists")} are no lists of ${cap} rows`),
  merge_rows: ({ count = 0, cap = 0, bound = 0, E = 0 }, _, size) =>
    count * Math.max(1, cap) > size("lists")
      ? `${size("lists")} do not hold ${count} lists of ${cap} rows`
      : 1 + 3 * bound + E + 1 !== size("index")
        ? `${size("index")} are no index of ${bound} rows of ${E} experts`
        : undefined,
};

/** `arrange` writes each element of y once, and reads within x. */
function faultOfArrange(d: Dims, { dims }: Compute): string | undefined {
  let [elements, last, n] = [1, 0, 0];
  for (; d[`n${n}`] !== undefined; n++) {
    const [size, stride] = [d[`n${n}`]!, d[`s${n}`] ?? -1];
    if (!Number.isInteger(size) || size < 1 || !Number.isInteger(stride) || stride < 0) return `size ${size} at stride ${stride}`;
    elements *= size;
    last += (size - 1) * stride;
  }
  for (const dim in dims) if (dim.startsWith("@")) last += dims[dim]![0] - d[dim]!;
  return n > 0 && elements === d.O && last < d.I! ? undefined : `it reads element ${last} of ${d.I}, and writes ${elements} of ${d.O}`;
}

function faultOfMove({ how, world, subAxes, from, to, bytes }: Collective, { mesh, buffers }: Known): string | undefined {
  const [a, b] = [buffers.get(from), buffers.get(to)];
  if (!a || !b) return `it names ${a ? to : from}, which is no buffer`;
  if (!areFactors(subAxes, mesh)) return `it runs over factors ${subAxes}, which the mesh has not`;
  const sent = bytesSent(how, world ? mesh.world : shardCount(mesh, subAxes), sizeOf(a), sizeOf(b));
  return bytes === sent ? undefined : `it sends ${sent} bytes, and says ${bytes}`;
}

function faultOfTransfer({ buffer, bytes }: Transfer, { buffers }: Known): string | undefined {
  const b = buffers.get(buffer);
  if (!b) return `it names ${buffer}, which is no buffer`;
  return bytes === sizeOf(b) ? undefined : `it has ${bytes} bytes, and ${buffer} ${sizeOf(b)}`;
}

function verifyParameters(known: Known): void {
  const { who, program, stages } = known;
  const names = new Set<string>();
  for (const p of program.parameters) {
    const must: Must = (ok, what) => invariant(ok, () => `${who}: parameter ${p.name}: ${what()}`);
    must(!names.has(p.name), () => "it is there twice");
    names.add(p.name);
    const [own, master] = [p.buffer, p.master].map((id) => bufferNamed(id, p.name, known)) as [Buffer, Buffer];
    bufferNamed(p.gradient, p.name, known);
    must(own.kind === "parameter" && ["parameter", "optimizer"].includes(master.kind), () => "its buffers are of other kinds");
    must(areSame(own.sizes, master.sizes), () => `it has sizes [${own.sizes}], and its main copy [${master.sizes}]`);
    must(
      p.tied_to === undefined || stages.some((s) => s.stage !== program.stage && s.parameters.some((q) => q.name === p.tied_to)),
      () => `no other stage has ${p.tied_to}`,
    );
  }
}

const scalars = new Set(["one", "mtp_coeff", "aux_weight", "lr", "step", "weight_decay", "loss_scale"]);

/** What the host writes into: a scalar, a number for each sequence, or for each token of a microbatch. */
function verifyInputs(known: Known): void {
  const { job, program } = known;
  const sequences = job.train.micro_batch * job.parallel.data;
  for (const [name, id] of Object.entries(program.inputs)) {
    const b = bufferNamed(id, `the input ${name}`, known);
    const size = scalars.has(name)
      ? 1
      : name === "sample"
        ? sequences
        : /^(ids|labels|weights)(_\d{1,4})?$/.test(name)
          ? sequences * job.model.seq
          : -1;
    invariant(size >= 0, () => `${known.who}: no input is named ${name}`);
    invariant(
      b.ragged === 0 && elementsOf(b.sizes) === size,
      () => `${known.who}: the input ${name} has ${size} elements, and ${id} [${b.sizes}]`,
    );
  }
}

/** What the host reads after a step is scalars, but for the tokens of each layer and expert. */
function verifyReadings({ who, program, buffers }: Known): void {
  const dimsOf = (id: string): number | undefined => buffers.get(id)?.shape.length;
  for (const [name, ids] of Object.entries(program.metrics))
    for (const id of ids) {
      const dims = name === "expert_loads" ? 2 : 0;
      invariant(dimsOf(id) === dims, () => `${who}: the metric ${name} has ${dims} dims, and ${id} ${dimsOf(id)}`);
    }
  for (const { needed } of program.bounds) invariant(dimsOf(needed) === 0, () => `${who}: ${needed} is read as a number, and is none`);
}
