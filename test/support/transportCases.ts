import type { Dtype } from "../../schemas/dtypes.ts";
import type { Drafted, Half } from "./contract.ts";
import { random } from "./opCases.ts";

type Row = readonly [b: number, s: number, e: number];

const numbers = (length: number, seed = 1): Float32Array => new Float32Array(length).map(random(seed));
const product = (sizes: readonly number[]): number => sizes.reduce((n, x) => n * x, 1);

/** Sizes and strides of the output, elements of the input, and where in it this rank's part begins. */
const arrangements: Readonly<Record<string, { n: number[]; s: number[]; x: number; at?: number[] }>> = {
  "one dim": { n: [7], s: [1], x: 7 },
  "blocks in another order": { n: [3, 2, 5], s: [5, 15, 1], x: 30 },
  "blocks in another order, in fours": { n: [3, 2, 8], s: [8, 24, 1], x: 48 },
  repeated: { n: [4, 3, 6], s: [0, 6, 1], x: 18 },
  "one of them": { n: [3, 4], s: [8, 1], x: 24, at: [4] },
  "one of them by two digits": { n: [5, 6], s: [24, 1], x: 120, at: [12, 6] },
  "at an odd place": { n: [3, 4], s: [15, 1], x: 45, at: [5] },
  transposed: { n: [6, 5], s: [1, 6], x: 30 },
  "many workgroups": { n: [3, 100, 2, 130], s: [260, 780, 130, 1], x: 78000 },
};

function arrange(half: Half): Drafted[] {
  return Object.entries(arrangements).flatMap(([title, { n, s, x, at = [] }]) =>
    (["f32", half, "i32"] as const).map((t) => ({
      title,
      d: {
        ...{ I: x, O: product(n) },
        ...Object.fromEntries(n.flatMap((size, i) => [[`n${i}`, size] as const, [`s${i}`, s[i]!] as const])),
      },
      outputs: { y: product(n) },
      dtype: { x: t, y: t },
      inputs: { x: t === "i32" ? numbers(x).map((v) => Math.floor(1000 * v)) : numbers(x) },
      ...(at.length > 0 ? { blocks: { strides: at, own: at.reduce((sum, n) => sum + n, 0) } } : {}),
    })),
  );
}

/** Each of `count` places, or −1: which of `from` rows stands there. None twice. */
function map(count: number, from: number, seed: number): Float32Array {
  const next = random(seed);
  const order = Array.from({ length: from }, (_, i) => ({ i, by: next() })).sort((a, b) => a.by - b.by);
  return Float32Array.from({ length: count }, () => (next() > -0.5 ? (order.pop()?.i ?? -1) : -1));
}

function takeRows(half: Half): Drafted[] {
  const shapes = [
    { N: 9, rows: 7, width: 5 },
    { N: 16, rows: 20, width: 8 },
    { N: 300, rows: 280, width: 130 },
    { N: 300, rows: 280, width: 1 },
    { N: 6, rows: 6, width: 1100 },
  ];
  return shapes.flatMap(({ N, rows, width }, i) =>
    (["f32", half] as const).map((t) => ({
      ...{ title: `${N} places of ${rows} rows of ${width}`, d: { N, I: rows * width, O: N * width, width }, outputs: { y: N * width } },
      ...{
        dtype: { x: t, from: "i32", y: t } satisfies Record<string, Dtype>,
        inputs: { x: numbers(rows * width), from: map(N, rows, i) },
      },
    })),
  );
}

const invertRows = (): Drafted[] =>
  [
    { I: 9, N: 7 },
    { I: 300, N: 530 },
    { I: 5, N: 2 },
  ].map(({ I, N }, i) => ({
    ...{ title: `${I} of ${N}`, d: { I, N }, outputs: { to: N }, dtype: { from: "i32", to: "i32" } satisfies Record<string, Dtype> },
    inputs: { from: map(I, N, i) },
  }));

/** Rows of B x S tokens and E experts, sorted by expert, sequence, token. */
function rowsOf(B: number, S: number, E: number, share: number, seed: number): Row[] {
  const next = random(seed);
  const rows: Row[] = [];
  for (let e = 0; e < E; e++) for (let b = 0; b < B; b++) for (let s = 0; s < S; s++) if ((next() + 1) / 2 < share) rows.push([b, s, e]);
  return rows;
}
const listOf = (rows: readonly Row[], length: number): Float32Array => {
  const list = new Float32Array(length).fill(-1);
  list.set([rows.length, ...rows.flat()]);
  return list;
};

/** The coordinates that decide where a row goes: a dim, and how it is sharded. */
interface Digit {
  readonly slot: 0 | 1 | 2;
  readonly div: number;
  readonly mod: number;
}
const routes: Readonly<Record<string, { B: number; S: number; E: number; share: number; digits: Digit[]; cap: number }>> = {
  "by expert": { B: 2, S: 5, E: 6, share: 0.4, digits: [{ slot: 2, div: 3, mod: 2 }], cap: 30 },
  "by expert and sequence, back to front": {
    ...{ B: 4, S: 7, E: 4, share: 0.5, cap: 28 },
    digits: [
      { slot: 0, div: 2, mod: 2 },
      { slot: 2, div: 1, mod: 4 },
    ],
  },
  "many rows": { B: 2, S: 300, E: 8, share: 0.3, digits: [{ slot: 2, div: 1, mod: 8 }], cap: 600 },
  "lists too short": { B: 2, S: 9, E: 4, share: 0.7, digits: [{ slot: 2, div: 2, mod: 2 }], cap: 11 },
  "no rows": { B: 2, S: 3, E: 4, share: 0, digits: [{ slot: 2, div: 2, mod: 2 }], cap: 12 },
  "all rows to one": { B: 2, S: 9, E: 4, share: 1, digits: [{ slot: 2, div: 4, mod: 3 }], cap: 80 },
};

function splitRows(): Drafted[] {
  return Object.entries(routes).flatMap(([title, { B, S, E, share, digits, cap }], i) => {
    const rows = rowsOf(B, S, E, share, i);
    const lists = product(digits.map((g) => g.mod));
    const index = listOf(rows, 1 + 3 * (rows.length + 5) + E + 1);
    const subAxes = digits.flatMap((g, j) => [
      [`slot${j}`, g.slot] as const,
      [`div${j}`, g.div] as const,
      [`mod${j}`, g.mod] as const,
      [`mul${j}`, product(digits.slice(j + 1).map((x) => x.mod))] as const,
    ]);
    const sizes = { lists: lists * (1 + 3 * cap), from: lists * cap };
    return withNeeded(i, {
      ...{ title, d: { I: index.length, O: sizes.lists, N: sizes.from, cap, ...Object.fromEntries(subAxes) }, outputs: sizes },
      ...{ dtype: { index: "i32", lists: "i32", from: "i32" }, inputs: { index } },
    });
  });
}

/** Rows cut by sequence into lists, each sorted as all are; `spare` entries of the bound stay free, or are lacking. */
const merges: Readonly<
  Record<
    string,
    { B: number; S: number; E: number; share: number; count: number; cap: number; spare: number; gather?: number; places?: true }
  >
> = {
  "two lists": { B: 4, S: 5, E: 3, share: 0.4, count: 2, cap: 40, spare: 9 },
  "one list": { B: 2, S: 5, E: 3, share: 0.4, count: 1, cap: 30, spare: 0 },
  "many rows": { B: 8, S: 100, E: 4, share: 0.3, count: 4, cap: 800, spare: 100 },
  "a bound too small": { B: 4, S: 5, E: 3, share: 0.8, count: 4, cap: 15, spare: -7 },
  "no rows": { B: 2, S: 5, E: 3, share: 0, count: 2, cap: 15, spare: 4 },
  "lists of another rank before": { B: 4, S: 5, E: 3, share: 0.4, count: 2, cap: 40, spare: 3, gather: 2 },
  // each list numbers its rows from 0: equal rows, and more of them than sequences
  "places of three lists": { B: 6, S: 7, E: 3, share: 0.5, count: 3, cap: 60, spare: 5, places: true },
};
/** The first local expert, and the experts beside those of the rows. */
const FIRST = 5;

function mergeRows(): Drafted[] {
  return Object.entries(merges).flatMap(([title, { B, S, E, share, count, cap, spare, gather = 0, places }], i) => {
    const rows = rowsOf(B, S, E, share, i).map(([b, s, e]): Row => [b, s, e + FIRST]);
    const length = 1 + 3 * cap + (i % 2);
    const bound = Math.max(1, rows.length + spare);
    const pieces = Array.from({ length: count }, (_, g) =>
      listOf(
        rows.filter(([b]) => Math.floor((b * count) / B) === g).map(([b, s, e], place): Row => (places ? [place, 0, e] : [b, s, e])),
        length,
      ),
    );
    const lists = Float32Array.from([...new Float32Array(gather * length), ...pieces.flatMap((p) => [...p])]);
    const sizes = { index: 1 + 3 * bound + E + 1, from: bound };
    return withNeeded(i, {
      ...{ title, outputs: sizes, dtype: { lists: "i32", index: "i32", from: "i32" }, inputs: { lists } },
      d: {
        ...{ I: lists.length, O: sizes.index, N: bound, count, length, cap, bound, E, B0: B, S0: S },
      },
      starts: { E: FIRST },
      ...(gather ? { blocks: { strides: [length], own: gather * length } } : {}),
    });
  });
}

/** With and without the count that shows an overflow. */
const withNeeded = (seed: number, draft: Drafted): Drafted[] => [
  draft,
  {
    ...draft,
    title: `${draft.title}, counted`,
    outputs: { ...draft.outputs, needed: 1 },
    dtype: { ...draft.dtype, needed: "i32" },
    inputs: { ...draft.inputs, needed: Float32Array.of(seed % 3) },
  },
];

export const messageDrafts: Readonly<Record<string, (half: Half) => Drafted[]>> = {
  ...{ arrange, take_rows: takeRows, invert_rows: invertRows, split_rows: splitRows, merge_rows: mergeRows },
};
