/** Runs any op of the table by its signature alone: random inputs of its types, the whole op, and the combined results of its shards. */
import { attentionMerge } from "../../src/ops/attention.ts";
import { type AnyOp, type Attrs, type DimSpec, expandLike, type Operand } from "../../src/ops/op.ts";
import { positionOf } from "../../src/ops/positions.ts";
import { dimSize } from "../../src/ops/signature.ts";

export type Sizes = Readonly<Record<string, number>>;
type Arrays = Readonly<Record<string, Float32Array>>;
export interface Case {
  readonly op: AnyOp;
  readonly inputs: readonly Operand[];
  readonly outputs: readonly Operand[];
  readonly attrs: Attrs;
  readonly sizes: Sizes;
  /** The inputs, and what outputs that are updated hold before. */
  readonly arrays: Arrays;
  readonly rows: Int32Array;
}

// small, different where they may differ, and none of them 1, so that every dim has two pieces
const SIZES = { A: 2, B: 4, S: 3, U: 3, D: 6, K: 5, N: 7, I: 24, O: 24, V: 9, E: 4, F: 5, H: 3, G: 2, J: 2, "#0": 3, "#1": 4 };
const ATTRS = {
  ...{ C: 8, W: 6, M: 2, P: 2, k: 2, normalize: 1, eps: 0.1, sign: 1, count: 12, c: 0.3, scale: 0.5, max: 1, chunk: 0, ranks: 2 },
  // rope: the middle of a head turns
  ...{ first: 2, width: 4, interleaved: 1, theta: 100, scaling: 2, factor: 2, original: 40, low: 1, high: 8, gain: 1.5 },
  // latent attention: what is joined, and heads of a latent
  ...{ A: 2, R: 5, Y: 7, Z: 8 },
  // what is random
  ...{ drop: 0.25, key0: 0x12345678, key1: 0x9abcdef0 },
  // the loss: of 9 columns of logits 7 belong to ids
  ids: 7,
  // routers
  ...{ rate: 0.1, groups: 2, group_top_k: 1, group_scores: 2 },
  ...{ beta1: 0.9, beta2: 0.95, momentum: 0.8, nesterov: 1, factor: 0.5, decay: 0.1, n0: 4, s0: 1, n1: 6, s1: 4 },
};

/** Uniform in (−1, 1), the same for the same seed (mulberry32). */
export function random(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2147483648 - 1;
  };
}

/** Whether an operand is a list of rows by place (src/ops/dispatch.ts): all places exist, and the index of an op tells of other rows. */
export const isList = (o: Operand): boolean => o.ragged > 0 && o.dimSpecs.some((s) => s.shared !== undefined);
/** Whether an op has such an operand. Then each place is a token, of one position, and a rank has the experts of one group. */
export const hasList = (op: AnyOp): boolean => [...op.inputs, ...op.outputs].some(isList);

export function makeCase(op: AnyOp, seed: number, attrs: Partial<Record<keyof typeof ATTRS, number>> = {}): Case {
  const next = random(seed);
  const { inputs, outputs } = expandLike(op, { dimSpecs: 2, ragged: 0 });
  const { B, E, V } = SIZES;
  const S = hasList(op) ? 1 : SIZES.S;
  const K = hasList(op) ? E : SIZES.K;
  const sizes: Sizes = { ...ATTRS, ...attrs, ...SIZES, S, K };
  const chosen = someExperts(B * S, E, next);
  const rows = rowsOf(chosen, B, S, E);
  const fill = (o: Operand): Float32Array => {
    const out = new Float32Array(elements(o, sizes));
    if (o.name === "c" && (o.dimSpecs.at(-1)?.dim === "E" || isList(o)))
      return chosen.length === out.length ? chosen : someExperts(out.length / E, E, next);
    // weights are above 0, and their sums well above
    if (o.name === "p" && o.dimSpecs.at(-1)?.dim === "E") return out.map(() => 1.2 + next());
    if (o.name === "ids" || o.name === "target") return out.map(() => Math.floor(((next() + 1) / 2) * V));
    if (o.name === "source") return out.map(() => Math.floor(((next() + 1) / 2) * SIZES.K));
    // sums of exponentials, squares and second moments; a step counts from 1
    if (["s", "sq", "by", "v", "total"].includes(o.name)) return out.map(() => 1.5 + next());
    if (o.name === "sample") return out.map((_, i) => 10 + i);
    if (o.name === "documents") return documentsOf({ B, S, chunk: sizes.chunk!, ranks: sizes.ranks! }, () => 0, 2);
    if (o.name === "step") return out.fill(3);
    return out.map(next);
  };
  const updated = outputs.filter((o) => op.inPlace?.includes(o.name));
  const arrays = Object.fromEntries(
    [...inputs, ...updated].map((o) => [o.name, o.dimSpecs.length || !updated.includes(o) ? fill(o) : new Float32Array(1)]),
  );
  return { op, inputs, outputs, attrs: { ...ATTRS, ...attrs, K }, sizes, arrays, rows };
}

/**
 * Random documents of about `length` tokens: of each token of a shard the position at which its document begins. Two shards of a sequence agree:
 * a border depends on the sequence and the position alone.
 */
export function documentsOf(
  { B, S, chunk, ranks }: Readonly<Record<"B" | "S" | "chunk" | "ranks", number>>,
  start: (dim: string) => number,
  length: number,
): Float32Array {
  return Float32Array.from({ length: B * S }, (_, i) => {
    let at = positionOf(start("S") + (i % S), chunk, ranks);
    const isBorder = (position: number): boolean => random(1000 * (start("B") + Math.floor(i / S)) + position)() < 2 / length - 1;
    while (at > 0 && !isBorder(at)) at--;
    return at;
  });
}

/** The map of a router: two or three experts of a token. */
function someExperts(tokens: number, E: number, next: () => number): Float32Array {
  const c = new Float32Array(tokens * E);
  for (let t = 0; t < tokens; t++) {
    const order = Array.from({ length: E }, (_, e) => ({ e, by: next() })).sort((a, b) => a.by - b.by);
    for (const { e } of order.slice(0, next() > 0 ? 2 : 3)) c[t * E + e] = 1;
  }
  return c;
}
function rowsOf(c: Float32Array, B: number, S: number, E: number): Int32Array {
  const rows: number[][] = [];
  for (let e = 0; e < E; e++) for (let b = 0; b < B; b++) for (let s = 0; s < S; s++) if (c[(b * S + s) * E + e]) rows.push([b, s, e]);
  return Int32Array.from([rows.length, ...rows.flat()]);
}

/** Elements of an operand; a ragged one at the bound where every (b,s,e) is a row. */
export const elements = (o: Operand, sizes: Sizes) => o.dimSpecs.reduce((n, s) => n * dimSize(s, sizes), 1);

/** Runs the op on one place; arrays of outputs are new. */
export function execute(c: Case, start: (dim: string) => number = () => 0): Record<string, Float32Array> {
  const out = Object.fromEntries(c.outputs.map((o) => [o.name, c.arrays[o.name]?.slice() ?? new Float32Array(elements(o, c.sizes))]));
  const place = { start, rows: c.rows };
  if (c.op.rows) {
    const bound = c.sizes.B! * c.sizes.S! * c.sizes.E!;
    place.rows = new Int32Array(1 + 3 * bound);
    c.op.rows(c.arrays, c.sizes, { start, rows: new Int32Array(1) }, place.rows, bound);
  }
  c.op.cpu({ ...c.arrays, ...out }, c.sizes, place);
  return out;
}

/** The dims that the signature allows to shard: leading factors of dims that no operand reads completely. */
export function cuttable({ inputs, outputs }: Pick<Case, "inputs" | "outputs">): string[] {
  const dimSpecs = [...inputs, ...outputs].flatMap((o) => o.dimSpecs);
  const ofLists = [...inputs, ...outputs].some(isList) ? ["S", "E", "K"] : [];
  const fixed = new Set([...dimSpecs.flatMap((s) => (s.replicated ? [s.dim, ...s.inner] : s.inner)), ...ofLists]);
  return [...new Set(dimSpecs.map((s) => s.dim))].filter((d) => !fixed.has(d));
}

/** Splits `dim` at `at`, runs both shards, and combines them by the signature. Returns the distance from the result of the whole. */
export function cutError(c: Case, dim: string, at: number): number {
  const whole = execute(c);
  const spans = [
    [0, at],
    [at, c.sizes[dim]!],
  ] as const;
  const pieces = spans.map(([from, to]) => {
    const piece: Case = {
      ...c,
      sizes: { ...c.sizes, [dim]: to - from },
      arrays: Object.fromEntries(
        [...c.inputs, ...c.outputs].filter((o) => c.arrays[o.name]).map((o) => [o.name, take(c.arrays[o.name]!, o, c, dim, from, to)]),
      ),
      rows: Int32Array.from([
        keptRows(c.rows, dim, from, to).length,
        ...keptRows(c.rows, dim, from, to).flatMap((r) => [...c.rows.subarray(1 + 3 * r, 4 + 3 * r)]),
      ]),
    };
    return execute(piece, (d) => (d === dim ? from : 0));
  });
  let error = 0;
  for (const o of c.outputs) {
    const has = o.dimSpecs.some((s) => s.dim === dim);
    const want = has ? spans.map(([from, to]) => take(whole[o.name]!, o, c, dim, from, to)) : [whole[o.name]!];
    const [a, b] = pieces.map((p) => p[o.name]!) as [Float32Array, Float32Array];
    const have = has ? [a, b] : [c.op.reduction === "merge" ? merged(c, pieces)[o.name]! : together(c.op.reduction, a, b)];
    for (const [i, w] of want.entries()) error = Math.max(error, distance(have[i]!, w));
  }
  return error;
}

const together = (reduction: "max" | undefined, a: Float32Array, b: Float32Array): Float32Array =>
  a.map((x, i) => (reduction === "max" ? Math.max(x, b[i]!) : x + b[i]!));
/** What attention to two pieces of the keys makes of the whole. */
function merged({ sizes }: Case, [a, b]: readonly Record<string, Float32Array>[]): Record<string, Float32Array> {
  const out = { o: new Float32Array(a!.o!.length), lse: new Float32Array(a!.lse!.length) };
  const d = { B: sizes.B!, S: sizes.S!, H: sizes.G! * sizes.M!, W: sizes.W! };
  attentionMerge.cpu({ a: a!.o!, la: a!.lse!, b: b!.o!, lb: b!.lse!, ...out }, d, { start: () => 0, rows: new Int32Array(1) });
  return out;
}

/** The largest difference, relative where numbers are large; NaN counts as infinitely far. */
export function distance(have: Float32Array, want: Float32Array): number {
  let error = have.length >= want.length ? 0 : Infinity;
  for (let i = 0; i < want.length; i++) {
    if (have[i] === want[i]) continue;
    const d = Math.abs(have[i]! - want[i]!) / (1 + Math.abs(want[i]!));
    error = d >= 0 ? Math.max(error, d) : Infinity;
  }
  return error;
}

const RAGGED = ["B", "S", "E"];
const keptRows = (rows: Int32Array, dim: string, from: number, to: number): number[] => {
  const by = RAGGED.indexOf(dim);
  return Array.from({ length: rows[0]! }, (_, r) => r).filter(
    (r) => by < 0 || (rows[1 + 3 * r + by]! >= from && rows[1 + 3 * r + by]! < to),
  );
};

/** The part of an operand that lies within a span of a dim; of ragged operands only the rows that exist. */
function take(x: Float32Array, o: Operand, c: Case, dim: string, from: number, to: number): Float32Array {
  const tail = o.dimSpecs.slice(o.ragged);
  const width = tail.reduce((n, s) => n * dimSize(s, c.sizes), 1);
  const dense = (part: Float32Array, dimSpecs: readonly DimSpec[]) => {
    const i = dimSpecs.findIndex((s) => s.dim === dim);
    if (i < 0) return part;
    const sizes = dimSpecs.map((s) => dimSize(s, c.sizes));
    const inner = sizes.slice(i + 1).reduce((n, s) => n * s, 1) * (sizes[i]! / c.sizes[dim]!);
    const stride = inner * c.sizes[dim]!;
    const outer = Array.from({ length: part.length / stride }, (_, j) => [
      ...part.subarray(j * stride + from * inner, j * stride + to * inner),
    ]);
    return Float32Array.from(outer.flat());
  };
  if (!o.ragged || isList(o)) return dense(x, o.dimSpecs);
  return Float32Array.from(keptRows(c.rows, dim, from, to).flatMap((r) => [...dense(x.subarray(r * width, r * width + width), tail)]));
}
