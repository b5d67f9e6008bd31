import type { NumberArg } from "../../runtime/webgpu/pipelines.ts";
import { type Dtype, encoded, valuesIn } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import { type GeneratedKernel, type KernelSpec, offsetsAt } from "../../src/codegen/kernelSpec.ts";
import { ops } from "../../src/ops/index.ts";
import { type AnyOp, expandLike, type Operand } from "../../src/ops/op.ts";
import { dimSize } from "../../src/ops/signature.ts";
import { type RowsMode, type Set as SizeSet, sets, sizesAt, variantsOf } from "./contractSizes.ts";
import { documentsOf, elements, hasList, isList, random, type Sizes } from "./opCases.ts";
import { isFull } from "./tiers.ts";
import { messageDrafts } from "./transportCases.ts";

export type Half = "bf16" | "f16";
export type Buffers = Record<string, Float32Array | Int32Array>;

export interface Executor {
  readonly name: string;
  /**
   * Runs a kernel. `data` holds every operand, and `rows` and `needed` where there are: bf16 and f16 as f32, to be packed by
   * the executor. Outputs that are not kept it fills with 0xFF bytes. Returns every buffer as it is afterwards.
   */
  run(made: GeneratedKernel, use: KernelSpec, data: Readonly<Buffers>, starts: Sizes): Promise<Buffers>;
}

export interface ContractCase {
  readonly title: string;
  readonly use: KernelSpec;
  readonly data: Readonly<Buffers>;
  /** What a launch receives: the global index of the first local element of each dim, and attributes. */
  readonly starts: Sizes;
  /** Outputs (and `rows`, `needed`) as the reference leaves them. Of ragged ones, the rows that exist. */
  readonly want: Readonly<Buffers>;
}

/** Outputs of an op, which arrive poisoned unless they are kept. */
export const isOutput = (op: OpName, name: string): boolean => ops[op].outputs.some((o) => o.name === name);

// -- types

/** Inputs that are f32 in any job: what a router makes of its scores, what the loss is made of, the log-sum-exp of attention, gradients of parameters. */
const always = new Set([
  "p",
  "c",
  "d",
  "n",
  "bias",
  "s",
  "m",
  "l",
  "weight",
  "lse",
  "la",
  "lb",
  "g",
  "scale",
  "lr",
  "step",
  "sq",
  "by",
  "ds",
  "dp",
  "u",
]);
/** … but what is added in the model's type. */
const inModel = (op: string, name: string): boolean => op === "add_bias" && name === "bias";
const indices = new Set(["ids", "target", "sample", "source", "documents"]);

/** The types that a plan in half precision has: as op.ts gives them, and a gradient arrives in the type of what it is the gradient of. */
function typesOf(op: AnyOp, half: Half): Record<string, Dtype> {
  const forward = Object.values(ops).find(({ name }) => name === op.name.replace(/_grad$/, ""));
  const of = forward && forward !== op ? typesOf(forward, half) : {};
  const result = forward && forward !== op ? of[forward.outputs[0]!.name] : undefined;
  const types: Record<string, Dtype> = {};
  for (const { name, dimSpecs, any } of op.inputs) {
    const f32 = (always.has(name) && !inModel(op.name, name)) || (dimSpecs.length === 0 && !any);
    types[name] = indices.has(name) ? "i32" : result && (name === "dy" || name === "y") ? result : f32 ? "f32" : half;
  }
  const like = op.inputs.map((o) => types[o.name]!).find((t) => t !== "i32") ?? "f32";
  // a gradient has the type of its value where op.ts states or infers it
  for (const { name } of op.outputs) types[name] = op.types?.[name] ?? (op.name.endsWith("_grad") ? of[name.slice(1)] : undefined) ?? like;
  return types;
}
const allF32 = (types: Readonly<Record<string, Dtype>>): Record<string, Dtype> =>
  Object.fromEntries(Object.entries(types).map(([n, t]) => [n, t === "i32" ? t : "f32"]));

/** Every combination of types in the contract. */
export function mixtures(op: AnyOp, half: Half): Readonly<Record<string, Dtype>>[] {
  const drafts = messageDrafts[op.name];
  if (drafts) return drafts(half).map((d) => d.dtype);
  const mixed = typesOf(op, half);
  const plain = allF32(mixed);
  // main gradients and moments in bf16
  const bf16State = Object.fromEntries(["g", "m", "v"].filter((n) => n in plain).map((n) => [n, half]));
  if (/^(adam|sgd).*_cast$/.test(op.name))
    return [plain, { ...plain, y: half }, ...(half === "bf16" ? [{ ...plain, y: half, ...bf16State }] : [])];
  if (half === "bf16" && /^(adam|sgd|muon_momentum|sum_squares)/.test(op.name)) return [plain, { ...plain, ...bf16State }];
  if (op.name === "cast") return [plain, { x: "f32", y: half }, { x: half, y: "f32" }];
  // the first of a ring's pieces is met as it was made, later ones by a sum in f32
  if (op.name === "attention_merge") return [plain, { ...mixed, o: "f32" }, { ...mixed, a: "f32", o: "f32" }, { ...mixed, a: "f32" }];
  if (op.name === "add") return [plain, mixed, { a: "f32", b: half, y: "f32" }];
  // logits of a router in f32, of a model that is not
  if (op.name === "gemm") return [plain, mixed, { x: half, w: half, y: "f32" }];
  if (op.name === "gemm_dgrad") return [plain, mixed, { dy: "f32", w: half, dx: half }];
  if (op.name === "gemm_wgrad")
    return [plain, mixed, { x: half, dy: "f32", dw: "f32" }, ...(half === "bf16" ? [{ ...mixed, dw: half }] : [])];
  if (op.name === "grouped_wgrad" && half === "bf16") return [plain, mixed, { ...mixed, dw: half }];
  if (op.name === "accumulate" && half === "bf16") return [plain, mixed, { x: half, y: half }];
  return Object.values(mixed).includes(half) ? [plain, mixed] : [plain];
}

/** What a value becomes when stored. */
export function rounded(x: Float32Array, dtype: Dtype): Float32Array {
  const stored = encoded(dtype, x);
  return stored.codec === null ? x.slice() : Float32Array.from(valuesIn(stored));
}

// -- cases

/** Outputs that the compiler may let add to what is there: gradients of parameters and what stands in their place, and losses. */
const addsUp = (op: AnyOp): string[] =>
  op.outputs.filter((o) => /^d(w[12]?|gain|table|bias)$/.test(o.name) || sums.includes(op.name)).map((o) => o.name);
const sums = [
  "mean",
  "weighted_sum",
  "source_losses",
  "dropped_rows",
  "aux_loss",
  "global_aux_loss",
  "z_loss",
  "router_entropy",
  "expert_load",
  "quantile",
];

/** A case whose buffers and reference are not made yet: of large ops they take seconds. */
interface Unmade {
  /** Its sizes are odd, or drafted by hand. */
  readonly odd: boolean;
  readonly make: () => ContractCase;
}

function unmadeOf(op: AnyOp, half: Half): Unmade[] {
  const messages = messageDrafts[op.name];
  if (messages) return messages(half).map((draft, i) => ({ odd: true, make: () => draftedCase(op, draft, i) }));
  const drafts: CaseDraft[] = [];
  const any = op.inputs.some((o) => o.any);
  for (const [name, set] of Object.entries(sets)) {
    if (set.only && !set.only.test(op.name)) continue;
    if (set.light && op.flops) continue;
    if (set.rows === "none" && !hasRows(op)) continue;
    const types = mixtures(op, half);
    const more = addsUp(op);
    const accumulates = more.length ? [[], more] : [[]];
    const combinations = types.flatMap((t, i) =>
      accumulates
        .filter((_, j) => set.full || accumulates.length === 1 || i === j)
        .flatMap((k) => variantsOf(op.name).map((attrs) => [t, k, attrs] as const)),
    );
    for (const [dtype, kept, attrs] of combinations) {
      const draft = { op, name, set, attrs, dtype, kept, seed: drafts.length };
      drafts.push(draft);
      if (any && op.inputs.length + op.outputs.length <= 3 && !op.inputs.some((o) => !o.any)) drafts.push({ ...draft, ragged: true });
      if (!op.rows) continue;
      drafts.push({ ...draft, makesRows: true });
      if (set.rows !== "none") drafts.push({ ...draft, makesRows: true, spare: -2 });
    }
  }
  return drafts.map((draft) => ({ odd: draft.name === "odd", make: () => makeCase(draft) }));
}

export const casesOf = (op: AnyOp, half: Half): ContractCase[] => unmadeOf(op, half).map(({ make }) => make());

/** The cases of an op that run in this tier. The fast tier has the first or the last of those at odd sizes, or of those drafted by hand. */
export function casesInTier(op: AnyOp, half: Half, inFast: "first" | "last"): ContractCase[] {
  const all = unmadeOf(op, half);
  const odd = all.filter((c) => c.odd);
  return (isFull ? all : inFast === "first" ? odd.slice(0, 1) : odd.slice(-1)).map(({ make }) => make());
}

const hasRows = (op: AnyOp): boolean => [...op.inputs, ...op.outputs].some((o) => o.ragged);

/** Returns the number that an argument of a launch takes from the starts of a case. */
export const startIn = (starts: Sizes, arg: NumberArg): number =>
  starts[arg.kind === "start" ? arg.dim : arg.kind === "block" ? "block" : arg.name]!;

/** A case whose sizes and inputs are given: what stands around a collective has shapes of its own. */
export interface Drafted {
  readonly title: string;
  /** Sizes and attributes; of each output, its elements. */
  readonly d: Sizes;
  readonly outputs: Sizes;
  readonly dtype: Readonly<Record<string, Dtype>>;
  /** Inputs, and outputs that are updated. */
  readonly inputs: Readonly<Record<string, Float32Array>>;
  readonly starts?: Sizes;
  /** Of an input of blocks, their strides, and the first element of this rank's. */
  readonly blocks?: { readonly strides: readonly number[]; readonly own: number };
}
function draftedCase(op: AnyOp, { title, d, outputs, dtype, inputs, starts: dims = {}, blocks }: Drafted, seed: number): ContractCase {
  const host = Object.fromEntries(Object.entries(inputs).map(([n, x]) => [n, rounded(x, dtype[n]!)]));
  // what the reference leaves alone may be anything
  const made = Object.fromEntries(
    Object.entries(outputs).map(([n, length]) => [n, host[n]?.slice() ?? new Float32Array(length).fill(NaN)]),
  );
  const own = blocks?.own ?? 0;
  op.cpu({ ...host, ...made }, d, { start: (dim) => dims[dim] ?? 0, rows: new Int32Array(1), block: own });
  const typed = (all: Readonly<Record<string, Float32Array>>): Buffers =>
    Object.fromEntries(Object.entries(all).map(([n, x]) => [n, dtype[n] === "i32" ? Int32Array.from(x) : x]));
  const data = { ...host, ...Object.fromEntries(Object.entries(made).map(([n, x]) => [n, host[n] ?? new Float32Array(x.length)])) };
  return {
    title: `${op.name}: ${title}, ${Object.values(dtype).join(".")}`,
    use: {
      ...{ op: op.name, name: `${op.name}_${seed}`, d, dtype, bound: 0, makesRows: false, mayOverflow: false },
      accumulates: new Set((op.inPlace ?? []).filter((n) => n in inputs)),
      size: Object.fromEntries(Object.entries(data).map(([n, x]) => [n, x.length])),
      ...(blocks && { blocks: blocks.strides }),
    },
    data: typed(data),
    starts: { ...dims, block: own },
    want: typed(made),
  };
}

interface CaseDraft {
  readonly op: AnyOp;
  readonly name: string;
  readonly set: SizeSet;
  readonly attrs: Sizes;
  readonly dtype: Readonly<Record<string, Dtype>>;
  readonly kept: readonly string[];
  readonly seed: number;
  /** The operands `...` are rows. */
  readonly ragged?: boolean;
  readonly makesRows?: boolean;
  /** Rows more than there are in the bound; the default depends on the set. */
  readonly spare?: number;
}

function makeCase({ op, name, set, attrs, dtype, kept, seed, ragged = false, makesRows = false, spare }: CaseDraft): ContractCase {
  const next = random(1000 * seed + 17);
  const d: Record<string, number> = {
    ...{ ...sizesAt(op.name, name), ...attrs },
    ...(hasList(op) && { B: set.sizes.B! * set.sizes.S!, S: 1, K: set.sizes.E! }),
    ...(ragged ? { "#0": set.sizes.B!, "#1": set.sizes.S!, "#2": set.sizes.E!, "#3": set.sizes.D! } : {}),
  };
  const { inputs, outputs } = expandLike(op, ragged ? { dimSpecs: 4, ragged: 3 } : { dimSpecs: 2, ragged: 0 });
  const operands = [...inputs, ...outputs];
  const whole = (dim: string) => operands.some((o) => o.dimSpecs.some((slot) => slot.dim === dim && slot.replicated));
  const start = (dim: string) => (ragged || whole(dim) ? 0 : (set.starts[dim] ?? 0));

  const mask = choices(d, set.rows, next);
  const index = operands.some((o) => o.ragged) ? indexOf(mask, d, start) : undefined;
  const count = index ? index.length / 3 : 0;
  const bound = index
    ? Math.max(1, spare !== undefined ? count + spare : name === "odd" ? d.B! * d.S! * d.E! : name === "aligned" ? count : count + 37)
    : 0;
  const overflows = count > bound;

  const existing = (o: Operand): boolean => o.ragged > 0 && !isList(o);
  const lengthOf = (o: Operand): number =>
    isList(o) ? elements(o, d) : o.dimSpecs.slice(o.ragged).reduce((n, slot) => n * dimSize(slot, d), o.ragged ? bound : 1);
  const accumulates = new Set([...(op.inPlace ?? []), ...kept]);
  const host: Record<string, Float32Array> = {};
  for (const [i, o] of operands.entries()) {
    const output = i >= inputs.length;
    const values =
      output && !accumulates.has(o.name) ? new Float32Array(lengthOf(o)) : fill(op, o, lengthOf(o), d, start, mask, seed, next);
    host[o.name] = rounded(values, dtype[o.name]!);
  }

  // what the reference makes of it
  const rows = index ? rowsBuffer(index, bound, d.E!, start("E")) : new Int32Array(1);
  const before = Object.fromEntries(Object.entries(host).map(([n, x]) => [n, x.slice()]));
  op.cpu(before, d, { start, rows });
  const want: Buffers = {};
  for (const o of outputs) {
    const exists = existing(o) ? (lengthOf(o) / bound) * rows[0]! : lengthOf(o);
    want[o.name] = before[o.name]!.subarray(0, exists);
  }

  const data: Buffers = Object.fromEntries(Object.entries(host).map(([n, x]) => [n, dtype[n] === "i32" ? Int32Array.from(x) : x]));
  const mayOverflow = makesRows && (overflows || seed % 2 === 0);
  if (index) {
    data.rows = makesRows ? new Int32Array(rows.length).fill(-1) : rows;
    if (makesRows) want.rows = rows;
  }
  if (mayOverflow) {
    data.needed = Int32Array.of(seed % 3);
    want.needed = Int32Array.of(Math.max(seed % 3, count));
  }
  const { runtimeAttrs = [] } = op;
  const own = Object.keys(d).filter((n) => !n.startsWith("#") && !runtimeAttrs.includes(n));
  return {
    title: [
      `${op.name}: ${name}`,
      Object.values(dtype).join("."),
      ...Object.entries(attrs).map(([name, value]) => `${name} ${value}`),
      ...(kept.length ? [`adds to ${kept}`] : []),
      ...(index ? [`${count} of ${bound} rows${makesRows ? " made" : ""}`] : []),
    ].join(", "),
    use: {
      ...{ op: op.name, name: `${op.name}_${seed}`, dtype, accumulates, bound, makesRows, mayOverflow },
      d: Object.fromEntries(own.map((n) => [n, d[n]!])),
      size: Object.fromEntries(operands.map((o) => [o.name, lengthOf(o)])),
    },
    data,
    starts: Object.fromEntries(Object.keys(d).map((name) => [name, runtimeAttrs.includes(name) ? d[name]! : start(name)])),
    want,
  };
}

const STEPS = [1, 2, 30, 1000, 100_000];

function fill(
  op: AnyOp,
  o: Operand,
  length: number,
  d: Sizes,
  start: (dim: string) => number,
  mask: Float32Array,
  seed: number,
  next: () => number,
): Float32Array {
  const out = new Float32Array(length);
  const positive = () => 1.01 + next();
  // a step that is skipped, and one that is not
  if (o.name === "scale" && seed % 3 === 1) return out;
  if (o.name === "sample") return out.map(() => Math.floor(1000 * (next() + 1)));
  if (o.name === "documents") return documentsOf({ B: d.B!, S: d.S!, chunk: d.chunk!, ranks: d.ranks! }, start, 4);
  if (o.name === "source") return out.map(() => Math.floor(((next() + 1) / 2) * (d.K ?? 0)));
  // some ids belong to the pieces before and after
  if (indices.has(o.name)) return out.map(() => Math.floor(start("V") - 2 + ((next() + 1) / 2) * (d.V! + 4)));
  if (/^[cd]$/.test(o.name) && (o.dimSpecs.at(-1)?.dim === "E" || isList(o)))
    return hasRows(op) && mask.length === length ? mask.slice() : out.map(() => Number(next() > 0));
  // in steps of 1/8, so that some are equal
  if (["apply_capacity", "expert_choice_mask"].includes(op.name) && o.name === "p") return out.map(() => Math.floor(8 * positive()) / 8);
  if (op.name.startsWith("top_k_mask") && o.name === "x") return out.map(() => Math.floor(8 * next()) / 8);
  if (o.name === "p" && o.dimSpecs.at(-1)?.dim === "E") return out.map(positive);
  if (o.name === "rounds") return out.fill(seed % 2 ? 0 : 50);
  if (
    ["s", "scale", "by"].includes(o.name) ||
    (op.name === "sqrt_softplus_grad" && o.name === "y") ||
    (op.name === "running_mean" && /^(n|total)$/.test(o.name)) ||
    (op.name.startsWith("adam") && o.name === "v")
  )
    return out.map(positive);
  // a sum of squares or a loss that is not finite, too
  if (o.name === "sq" || (op.name === "mark_nonfinite" && o.name === "x"))
    return seed % 3 ? out.fill(seed % 3 === 1 ? Infinity : Number.NaN) : out.map(positive);
  // pieces that a query sees nothing of: the one, the other, both
  if (op.name === "attention_merge" && o.name.startsWith("l")) return out.map(() => (next() > 0.3 ? -Infinity : 4 * next()));
  if (o.name === "step") return out.fill(STEPS[seed % STEPS.length]!);
  if (o.name === "lr") return out.fill(0.01);
  if (o.name === "gain") return out.map(() => 1 + next() / 2);
  return out.map(next);
}

/** [B,S,E]: who chose whom. */
function choices({ B, S, E, k }: Sizes, mode: RowsMode, next: () => number): Float32Array {
  const c = new Float32Array(B! * S! * E!);
  for (let t = 0; t < B! * S!; t++) {
    const order = Array.from({ length: E! }, (_, e) => ({ e, by: next() })).sort((a, b) => a.by - b.by);
    const some = order.slice(0, Math.min(E!, k! + (next() > 0 ? 1 : 0))).map((x) => x.e);
    // gaps: no token for the first and the last expert, and no expert for every third token
    const chosen = { some, gaps: t % 3 ? some.filter((e) => e > 0 && e < E! - 1) : [], one: [1], none: [] }[mode];
    for (const e of chosen) c[t * E! + e] = 1;
  }
  return c;
}
/** The rows of this map by expert, sequence, token; global. */
function indexOf(c: Float32Array, { B, S, E }: Sizes, start: (dim: string) => number): number[] {
  const rows: number[] = [];
  for (let e = 0; e < E!; e++)
    for (let b = 0; b < B!; b++)
      for (let s = 0; s < S!; s++) if (c[(b * S! + s) * E! + e]) rows.push(start("B") + b, start("S") + s, start("E") + e);
  return rows;
}
/** The index buffer (src/codegen/kernelSpec.ts): the count, the rows, the offsets; what lies between is −1. */
function rowsBuffer(index: readonly number[], bound: number, E: number, first: number): Int32Array {
  const count = Math.min(bound, index.length / 3);
  const out = new Int32Array(offsetsAt(bound) + E + 1).fill(-1);
  out[0] = count;
  out.set(index.slice(0, 3 * count), 1);
  for (let e = 0; e <= E; e++) {
    let at = 0;
    while (at < count && index[3 * at + 2]! < first + e) at++;
    out[offsetsAt(bound) + e] = at;
  }
  return out;
}
