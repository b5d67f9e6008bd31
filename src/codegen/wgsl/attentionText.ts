/** Text of the passes of attention kernels: operands in memory, tiles, and the values of the template. */
import { render } from "../../../templates/bindings.ts";
import { type AttentionSizes, isReordered } from "../attentionSizes.ts";
import type { KernelOperand } from "../kernelSpec.ts";
import { type Binding, float, foldGrid, scalar } from "./text.ts";

/** An operand with a vector for each head of each query or key. */
export interface AttentionVectors extends KernelOperand {
  readonly channels: number;
  /** Channels in words of 4. */
  readonly words: number;
  /** Channels per memory access. */
  readonly run: 1 | 4;
  readonly side: "queries" | "keys";
}

/** One entry: blocks of rows, whose sums it computes, iterate over the columns. */
export interface Pass {
  readonly entry: string;
  readonly rows: "queries" | "keys";
  /** Products of an operand of the rows with one of the columns: the score `s` and, in the gradient, the gradient `w` of the weight. */
  readonly scores: readonly { readonly name: "s" | "w"; readonly row: AttentionVectors; readonly column: AttentionVectors }[];
  /** Sums over the columns of `s` or `w`, as they are after the softmax, times an operand of the columns. */
  readonly sums: readonly { readonly name: "s" | "w"; readonly column: AttentionVectors; readonly to: AttentionVectors }[];
  readonly buffers: readonly Binding[];
  /** The name of the uniform. */
  readonly start: string;
}

/** Tiles in workgroup memory: 4 x 4 scores per thread. */
export interface AttentionTiling {
  readonly rows: number;
  readonly columns: number;
  /** Threads along the columns. */
  readonly across: number;
  readonly threads: number;
  /** Words of four values in the stage. */
  readonly stageWords: number;
  /** The largest number of channels in the stage at once. */
  readonly step: number;
}

const LETTERS = ["x", "y", "z", "w"] as const;

/** Returns how many channels of scores are in the stage at once: the largest of `most`, 8 and 4 that divides the width in words. */
export const stepOf = ({ words }: AttentionVectors, most: number): number => [most, 8].find((s) => words % (s / 4) === 0) ?? 4;

/** Returns the number of workgroups of a pass. */
export const workgroupsOf = ({ rows }: Pick<Pass, "rows">, { B, S, U, G, M }: AttentionSizes, tiling: AttentionTiling): number =>
  rows === "queries" ? B * G * M * Math.ceil(S / tiling.rows) : B * G * Math.ceil(U / tiling.rows);

/** Returns the values of the template for one pass. */
export function passText(p: Pass, sizes: AttentionSizes, tiling: AttentionTiling) {
  const { B, S, U, G, M, part, grad, drops } = sizes;
  const { rows } = tiling;
  const byQueries = p.rows === "queries";
  const heads = byQueries ? G * M : G;
  const blocks = Math.ceil((byQueries ? S : U) / rows);
  const places = workgroupsOf(p, sizes, tiling);
  const queryAt = (head: string) => `batch * ${S * G * M}u + ${head}`;
  const keyAt = (head: string) => `batch * ${U * G}u + ${head}`;
  return {
    ...{ entry: p.entry, index: foldGrid(places).index, places, byQueries, gradient: grad, online: !grad },
    ...{ start: drops ? `${p.start}.start` : p.start, runtimeAttrs: p.start },
    block: byQueries ? `${blocks - 1}u - place / ${B * heads}u` : `place / ${B * heads}u`,
    ...{ heads: B * heads, headsOfOne: heads, group: M, logSum: part ? "log_sum_bits" : "log_sum" },
    rowHead: byQueries ? queryAt("head") : keyAt("head"),
    columnHead: byQueries ? keyAt(M > 1 ? `head / ${M}u` : "head") : queryAt("query_head"),
    sums: p.sums.flatMap(({ to }) => sumsOf(to, tiling).map((s) => s.sum)),
    scores: p.scores.map((s) => scoreText(s, tiling)),
    four: LETTERS.map((letter, number) => ({ letter, number })),
    rescaled: p.sums.flatMap(({ to }) => sumsOf(to, tiling)),
    weighted: p.sums.map((s) => weightedText(s, tiling)),
    draws: (rows * tiling.columns) / 8,
    results: p.sums.flatMap(({ to }) =>
      sumsOf(to, tiling).map(({ letter, group, sum }) => ({
        ...{ to: to.name, letter, c: `(tx + ${group * tiling.across}u) * 4u` },
        value: grad ? sum : `${sum} * by.${letter}`,
      })),
    ),
  };
}

/** The groups of words of an operand: each thread along the columns has one word of each group. */
const groupsOf = ({ words }: AttentionVectors, { across }: AttentionTiling): number[] =>
  Array.from({ length: Math.ceil(words / across) }, (_, group) => group);
/** The sums of one thread, per row and group of words. */
const sumsOf = (to: AttentionVectors, tiling: AttentionTiling) =>
  LETTERS.flatMap((letter, i) => groupsOf(to, tiling).map((group) => ({ letter, group, sum: `sum_${to.name}${i}_${group}` })));

function scoreText({ name, row, column }: Pass["scores"][number], { rows, columns, step: most }: AttentionTiling) {
  const step = stepOf(row, most);
  return {
    ...{ row: row.name, column: column.name, step, wide: row.words * 4, runsOfStep: step / 4 },
    ...{ rowRuns: (rows * step) / 4, columnRuns: (columns * step) / 4, columnsAt: (step * rows) / 4 },
    products: LETTERS.map((letter, j) => ({ name: `${name}${j}`, letter })),
  };
}

function weightedText({ name, column, to }: Pass["sums"][number], tiling: AttentionTiling) {
  const { across, columns, stageWords } = tiling;
  const { words } = column;
  // as many columns of the operand as the stage has room for, a power of two
  const lanes = Math.min(columns, 2 ** Math.floor(Math.log2(stageWords / words)));
  // in the last group, threads beyond the last word repeat it and do not store
  const word = (group: number) => {
    const at = group ? `tx + ${group * across}u` : "tx";
    return (group + 1) * across > words ? `min(${at}, ${words - 1}u)` : at;
  };
  return {
    ...{ column: column.name, channelWords: words, lanes, laneRuns: lanes * words },
    words: LETTERS.map((_, number) => ({ number, name: `${name}${number}` })),
    reads: groupsOf(to, tiling).map((group) => ({ name: `value${group}`, at: word(group) })),
    adds: sumsOf(to, tiling).map(({ letter, group, sum }) => ({ sum, letter, value: `value${group}` })),
  };
}

/** Returns the text of the factors of weights. The gradient reads the numbers of sequences in halves after the dots in scratch, because the number of buffers is limited. */
export function randomText(
  { B, S, U, G, M, part, grad, chunk }: AttentionSizes,
  { threshold, factor, inBlocksOf16 }: NonNullable<AttentionSizes["drops"]>,
  { rows, columns }: AttentionTiling,
): string {
  const [keyStart, headStart] = part ? ["starts.y", "starts.z"] : ["0", "starts.y"];
  const at = (start: string, count: number, lane: string) =>
    chunk ? `position_in(runs_of(${start}, ${count}), i32(min(${lane}, ${count - 1}u)))` : `${start} + i32(${lane})`;
  const samplesAt = B * S * G * M;
  return render("wgsl/attention_random.wgsl", {
    ...{ philox: render("wgsl/philox.wgsl", {}), inBlocksOf16, threshold, factor: float(factor), group: M, headStart, keyStart },
    ...{ queryAt: at("starts.x", S, "query"), keyAt: at(keyStart, U, "key") },
    ...{ blockRows: rows, blockColumns: columns, droppedWords: (rows * columns) / 8 },
    sample: grad ? `(u32(dots[${samplesAt}u + batch * 2u]) << 16u) + u32(dots[${samplesAt}u + batch * 2u + 1u])` : "u32(sample[batch])",
  });
}

/** Returns the index in its shard of the query or key that is at index `at` by position. */
export function indexInShard(sizes: AttentionSizes, side: AttentionVectors["side"]): string {
  const [count, start] = side === "keys" ? [sizes.U, sizes.part ? "here.y" : "0"] : [sizes.S, "here.x"];
  return isReordered(sizes, count) ? `place_in(${start}, ${count}, at)` : "at";
}
/** The last lane of an operand, the stride between lanes in heads, and the channels of each head. */
function memoryOf(v: AttentionVectors, sizes: AttentionSizes) {
  const { S, U, G, M } = sizes;
  const [last, stride] = v.side === "keys" ? [U - 1, G] : [S - 1, G * M];
  return { name: v.name, last, stride, channels: v.channels, place: indexInShard(sizes, v.side) };
}

/** Returns the values of the template for the function that loads four channels of an operand. */
export function loaderOf(v: AttentionVectors, sizes: AttentionSizes) {
  const { name, channels } = v;
  // channels beyond the last read the last one and count as zero
  const one = (j: number) => `select(0.0, f32(${name}[i - c + min(c + ${j}u, ${channels - 1}u)]), c + ${j}u < ${channels}u)`;
  const value = v.run === 4 ? `vec4<f32>(${name}[i / 4u])` : `vec4<f32>(${[0, 1, 2, 3].map(one).join(", ")})`;
  return { ...memoryOf(v, sizes), value };
}

/** Returns the values of the template for the function that stores four channels of an operand. */
export function writerOf(v: AttentionVectors, sizes: AttentionSizes) {
  const { name, channels } = v;
  const type = scalar(v.dtype);
  const one = (letter: string, j: number) => {
    const store = `${name}[i + ${j}u] = ${type}(sum.${letter});`;
    return j ? `  if (c + ${j}u < ${channels}u) { ${store} }` : `  ${store}`;
  };
  const text = v.run === 4 ? `  ${name}[i / 4u] = vec4<${type}>(sum);` : LETTERS.map(one).join("\n");
  return { ...memoryOf(v, sizes), text };
}
