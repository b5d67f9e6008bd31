/**
 * Causal grouped-query attention and its gradient, on all keys or a piece of them: a block of lanes against all the lanes it meets,
 * 32 or 64 at a time; no matrix of scores is ever in memory. Forward and dq go over the keys of a block of queries; dk and dv over the
 * queries of a block of keys, of every query head that reads them. Scores are computed anew in each.
 */
import { render } from "../../../templates/bindings.ts";
import { runtimeAttrs } from "../../ops/dropout.ts";
import { invariant } from "../../ops/op.ts";
import { type AttentionSizes, attentionSizes, isReordered } from "../attentionSizes.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { type Binding, bound, type EntryPoint, float, foldGrid, header, kernel, scalar, scratchBytes, vector, widthOf } from "./text.ts";

export const attention: Readonly<Record<string, (spec: KernelSpec) => GeneratedKernel>> = {
  ...{ attention: forward, attention_grad: backward, attention_part: forward, attention_part_grad: backward },
  ...{
    attention_dropout: forward,
    attention_dropout_grad: backward,
    attention_dropout_part: forward,
    attention_dropout_part_grad: backward,
  },
  attention_merge: merge,
};

const LETTERS = ["x", "y", "z", "w"] as const;
const DOT_THREADS = 128;
/** Channels that scores take at once from workgroup memory: with 64 rows and 32 columns, 6 KiB beside 8 KiB of weights. */
const STEP = 16;

/** One entry: blocks of `rows` lanes, whose sums it makes, go over the lanes of the other side. */
interface Pass {
  readonly entry: string;
  readonly by: "queries" | "keys";
  /** Products that make a score and, in the gradient, a weight's gradient: an operand of the rows with one of the columns. */
  readonly scores: readonly { readonly name: "s" | "w"; readonly row: string; readonly column: string }[];
  /** Sums over the columns: of the value `name`, as s or w stand after the softmax, times an operand of the columns. */
  readonly sums: readonly { readonly name: "s" | "w"; readonly column: string; readonly to: string }[];
  readonly buffers: readonly Binding[];
  readonly start: string;
}

function forward(spec: KernelSpec): GeneratedKernel {
  return made(spec, [
    {
      entry: spec.name,
      by: "queries",
      scores: [{ name: "s", row: "q", column: "k" }],
      sums: [{ name: "s", column: "v", to: "o" }],
      buffers: ["q", "k", "v", ...(spec.dtype.sample ? ["sample"] : []), "o", "lse"].map((name) => operand(spec, name)),
      start: "start",
    },
  ]);
}

function backward(spec: KernelSpec): GeneratedKernel {
  const scores = (own: "q" | "k") =>
    own === "q"
      ? ([
          { name: "s", row: "q", column: "k" },
          { name: "w", row: "dy", column: "v" },
        ] as const)
      : ([
          { name: "s", row: "k", column: "q" },
          { name: "w", row: "v", column: "dy" },
        ] as const);
  const reads = [...["dy", "q", "k", "v", "lse"].map((name) => operand(spec, name)), { arg: scratchStart, name: "dots", type: "f32" }];
  return made(spec, [
    {
      entry: `${spec.name}_dq`,
      by: "queries",
      scores: scores("q"),
      sums: [{ name: "w", column: "k", to: "dq" }],
      buffers: [...reads, operand(spec, "dq")],
      start: "start",
    },
    {
      entry: `${spec.name}_dkv`,
      by: "keys",
      scores: scores("k"),
      sums: [
        { name: "s", column: "dy", to: "dv" },
        { name: "w", column: "q", to: "dk" },
      ],
      buffers: [...reads, operand(spec, "dk"), operand(spec, "dv")],
      start: "start_keys",
    },
  ]);
}

/** Queries and keys have one width, values and outputs another. */
const channelsOf = (spec: KernelSpec, name: string): number => (["q", "k", "dq", "dk"].includes(name) ? spec.d.C! : spec.d.W!);
const wordsOf = (spec: KernelSpec, name: string): number => Math.ceil(channelsOf(spec, name) / 4);
const runOf = (spec: KernelSpec, name: string): 1 | 4 => (channelsOf(spec, name) % 4 === 0 ? 4 : 1);
/** Of a piece, log-sum-exps are written as bits: WGSL has no number for those of no key. */
const operand = (spec: KernelSpec, name: string): Binding => ({
  arg: name,
  type: typeOf(spec, name),
});
function typeOf(spec: KernelSpec, name: string): string {
  if (name === "lse") return spec.op.endsWith("_part") ? "u32" : "f32";
  return name === "sample" ? "i32" : vector(scalar(spec.dtype[name]!), runOf(spec, name));
}

/** Rows and threads across of a block: 4 x 4 scores per thread, and per thread at most 64 sums of each kind where widths are at most 256. */
function blockOf({ B, S, U, G, M, C, W }: AttentionSizes): { rows: number; across: number } {
  const across = Math.max(C, W) > 128 ? 16 : 8;
  // the fewer rows, the more often the other side is read; the more, the fewer blocks there are to run at once
  const blocks = (rows: number) => B * G * Math.min(M * Math.ceil(S / rows), Math.ceil(U / rows));
  const rows = [64, 32].find((r) => r * across <= 512 && Math.max(S, U) > r / 2 && blocks(r) >= 128);
  return { rows: rows ?? (Math.max(S, U) > 16 ? 32 : 16), across };
}

function made(spec: KernelSpec, passes: readonly Pass[]): GeneratedKernel {
  const sizes = attentionSizes(spec);
  const { B, S, U, G, M, W, part, grad, chunk, ranks, drops } = sizes;
  invariant(spec.accumulates.size === 0, `${spec.op} adds to nothing`);
  const { rows, across } = blockOf(sizes);
  const columns = across * 4;
  const threads = (rows / 4) * across;
  const stepOf = (row: string): number => [STEP, 8, 4].find((s) => wordsOf(spec, row) % (s / 4) === 0)!;
  const scores = passes.flatMap((p) => p.scores);
  const sums = passes.flatMap((p) => p.sums);
  const stageWords = Math.max(
    ...scores.map((s) => stepOf(s.row) * (rows / 4 + across)),
    threads,
    ...sums.map((s) => wordsOf(spec, s.column)),
  );
  // as many columns of the summed operand as the stage holds, a power of two
  const lanesOf = (words: number): number => Math.min(columns, 2 ** Math.floor(Math.log2(stageWords / words)));
  const moved = isReordered(sizes, S) || isReordered(sizes, U);
  const starts = [...(part ? ["S", "U"] : ["S"]), ...(drops ? ["G"] : [])];
  const attrs = drops ? runtimeAttrs : [];
  const count = B * S * G * M;
  const main = passes.map((p): EntryPoint => {
    const { entry, buffers, start } = p;
    return { entry, grid: places(p), threads, buffers, starts, attrs, uniform: start };
  });
  const dotGroups = Math.ceil(count / DOT_THREADS);
  const dots = (): EntryPoint => ({
    entry: `${spec.name}_dots`,
    grid: dotGroups,
    threads: DOT_THREADS,
    buffers: [
      operand(spec, "dy"),
      operand(spec, "o"),
      { arg: scratchStart, name: "dots_out", type: "f32" },
      ...(drops ? [operand(spec, "sample")] : []),
    ],
    ...(moved ? { starts, uniform: "start_dots" } : {}),
  });
  const entries = grad ? [dots(), ...main] : main;
  const outputs = sums.map((s) => s.to);
  const { bindings, launches } = bound(entries);
  const source = render("wgsl/attention.wgsl", {
    ...{ header: header(spec.dtype), bindings, name: spec.name, gradient: grad, part, moved, drops: drops !== undefined },
    ...{ random: drops ? randomText(sizes, drops) : "", batches: B },
    sight: render("wgsl/attention_mask.wgsl", {
      ...{ zigzag: chunk > 0, chunk, ranks, blocks: 2 * ranks, lastBlock: 2 * ranks - 1, queries: S, keys: U },
      keyStart: part ? "starts.y" : "0",
    }),
    ...{ threads, rows, columns, across, stageWords, weightWords: (columns * rows) / 4, rowWords: rows / 4 },
    ...{ queries: S, queryHeads: G * M, headsOfSequence: S * G * M, queryPlace: placeOf(sizes, "q"), scale: float(sizes.scale) },
    ...{ dotThreads: DOT_THREADS, dotIndex: foldGrid(dotGroups).index, dotCount: count, valueChannels: W },
    loaders: Object.keys(spec.dtype)
      .filter((name) => name !== "lse" && name !== "sample" && !outputs.includes(name))
      .map((name) => ({ name, ...lie(spec, sizes, name), value: loaded(spec, name) })),
    writers: outputs.map((name) => ({ name, ...lie(spec, sizes, name), text: written(spec, name) })),
    passes: passes.map((p) => passText(p)),
  });
  return { source, launches, ...(grad ? { scratch: scratchBytes(count + (drops ? 2 * B : 0)) } : {}) };

  function places({ by }: Pass): number {
    return by === "queries" ? B * G * M * Math.ceil(S / rows) : B * G * Math.ceil(U / rows);
  }

  function passText(p: Pass) {
    const byQueries = p.by === "queries";
    const heads = byQueries ? G * M : G;
    const blocks = Math.ceil((byQueries ? S : U) / rows);
    const queryAt = (head: string) => `batch * ${S * G * M}u + ${head}`;
    const keyAt = (head: string) => `batch * ${U * G}u + ${head}`;
    const groupsOf = (to: string) => Array.from({ length: Math.ceil(wordsOf(spec, to) / across) }, (_, g) => g);
    // the last run of threads may have fewer channels than threads: they repeat the last, and do not store
    const word = (g: number, words: number) => {
      const at = g ? `tx + ${g * across}u` : "tx";
      return (g + 1) * across > words ? `min(${at}, ${words - 1}u)` : at;
    };
    const sum = (to: string, i: number, g: number) => `sum_${to}${i}_${g}`;
    const each = (to: string) => LETTERS.flatMap((letter, i) => groupsOf(to).map((g) => ({ letter, g, sum: sum(to, i, g) })));
    return {
      ...{
        entry: p.entry,
        index: foldGrid(places(p)).index,
        places: places(p),
        byQueries,
        gradient: grad,
        online: !grad,
        start: drops ? `${p.start}.start` : p.start,
        runtimeAttrs: p.start,
      },
      block: byQueries ? `${blocks - 1}u - place / ${B * heads}u` : `place / ${B * heads}u`,
      ...{ heads: B * heads, headsOfOne: heads, group: M, logSum: part ? "log_sum_bits" : "log_sum" },
      mine: byQueries ? queryAt("head") : keyAt("head"),
      other: byQueries ? keyAt(M > 1 ? `head / ${M}u` : "head") : queryAt("query_head"),
      sums: p.sums.flatMap(({ to }) => each(to).map((s) => s.sum)),
      scores: p.scores.map(({ name, row, column }) => {
        const step = stepOf(row);
        return {
          ...{ row, column, step, wide: wordsOf(spec, row) * 4, runsOfStep: step / 4 },
          ...{ rowRuns: (rows * step) / 4, columnRuns: (columns * step) / 4, columnsAt: (step * rows) / 4 },
          products: LETTERS.map((letter, j) => ({ name: `${name}${j}`, letter })),
        };
      }),
      four: LETTERS.map((letter, number) => ({ letter, number })),
      shrinks: p.sums.flatMap(({ to }) => each(to)),
      weighted: p.sums.map(({ name, column, to }) => {
        const channelWords = wordsOf(spec, column);
        const lanes = lanesOf(channelWords);
        return {
          ...{ column, channelWords, lanes, laneRuns: lanes * channelWords },
          words: LETTERS.map((_, number) => ({ number, name: `${name}${number}` })),
          reads: groupsOf(to).map((g) => ({ name: `value${g}`, at: word(g, channelWords) })),
          adds: each(to).map(({ letter, g, sum }) => ({ sum, letter, value: `value${g}` })),
        };
      }),
      results: p.sums.flatMap(({ to }) =>
        each(to).map(({ letter, g, sum }) => ({
          ...{ to, letter, c: `(tx + ${g * across}u) * 4u` },
          value: grad ? sum : `${sum} * by.${letter}`,
        })),
      ),
    };
  }
}

/** What weights are multiplied by. The gradient reads sequences' numbers behind its dots, in halves: of buffers it has as many as may be. */
function randomText(
  { B, S, U, G, M, part, grad, chunk }: AttentionSizes,
  { threshold, factor, keysAligned4 }: NonNullable<AttentionSizes["drops"]>,
): string {
  const [keyStart, headStart] = part ? ["starts.y", "starts.z"] : ["0", "starts.y"];
  const at = (start: string, count: number, lane: string) =>
    chunk ? `position_in(runs_of(${start}, ${count}), i32(${lane}))` : `${start} + i32(${lane})`;
  const ringOffset = B * S * G * M;
  return render("wgsl/attention_random.wgsl", {
    ...{ philox: render("wgsl/philox.wgsl", {}), keysAligned4, threshold, factor: float(factor), group: M, headStart },
    ...{
      queryAt: at("starts.x", S, `min(query, ${S - 1}u)`),
      keyAt: at(keyStart, U, "key"),
      nextAt: at(keyStart, U, `min(key + j, ${U - 1}u)`),
    },
    sample: grad ? `(u32(dots[${ringOffset}u + batch * 2u]) << 16u) + u32(dots[${ringOffset}u + batch * 2u + 1u])` : "u32(sample[batch])",
  });
}

const ofKey = (name: string): boolean => ["k", "v", "dk", "dv"].includes(name);
/** Where a lane, counted in the order of positions as `at`, lies in its piece. */
function placeOf(sizes: AttentionSizes, name: string): string {
  const [count, start] = ofKey(name) ? [sizes.U, sizes.part ? "here.y" : "0"] : [sizes.S, "here.x"];
  return isReordered(sizes, count) ? `place_in(${start}, ${count}, at)` : "at";
}
/** How lanes lie: the last, from one to the next in heads, and the channels of each. */
function lie(spec: KernelSpec, sizes: AttentionSizes, name: string) {
  const { S, U, G, M } = sizes;
  const [last, stride] = ofKey(name) ? [U - 1, G] : [S - 1, G * M];
  return { last, stride, channels: channelsOf(spec, name), place: placeOf(sizes, name) };
}
function loaded(spec: KernelSpec, name: string): string {
  if (runOf(spec, name) === 4) return `vec4<f32>(${name}[i / 4u])`;
  const channels = channelsOf(spec, name);
  // the last channel stands for those past it, which count as zero
  const one = (j: number) => `select(0.0, f32(${name}[i - c + min(c + ${j}u, ${channels - 1}u)]), c + ${j}u < ${channels}u)`;
  return `vec4<f32>(${[0, 1, 2, 3].map(one).join(", ")})`;
}
function written(spec: KernelSpec, name: string): string {
  const type = scalar(spec.dtype[name]!);
  if (runOf(spec, name) === 4) return `  ${name}[i / 4u] = vec4<${type}>(sum);`;
  const store = (j: number) => `${name}[i + ${j}u] = ${type}(sum.${LETTERS[j]});`;
  return [0, 1, 2, 3].map((j) => (j ? `  if (c + ${j}u < ${channelsOf(spec, name)}u) { ${store(j)} }` : `  ${store(j)}`)).join("\n");
}

const MERGE_THREADS = 256;
function merge(spec: KernelSpec): GeneratedKernel {
  const { d, dtype } = spec;
  const width = widthOf(d.W!);
  const count = (d.B! * d.S! * d.H! * d.W!) / width;
  const wide = (name: string): Binding => ({ arg: name, type: vector(scalar(dtype[name]!), width) });
  const bits = (name: string): Binding => ({ arg: name, type: "u32" });
  const grid = Math.ceil(count / MERGE_THREADS);
  const buffers = [wide("a"), bits("la"), wide("b"), bits("lb"), wide("o"), bits("lse")];
  const text = render("wgsl/attention_merge.wgsl", {
    ...{ entry: spec.name, threads: MERGE_THREADS, index: foldGrid(grid).index, count, width, vectors: d.W! / width },
    ...{ vector: vector("f32", width), type: vector(scalar(dtype.o!), width) },
  });
  return kernel(spec, [{ entry: spec.name, grid, threads: MERGE_THREADS, buffers }], [text]);
}
