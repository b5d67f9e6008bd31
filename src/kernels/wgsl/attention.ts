/**
 * Causal grouped-query attention and its gradient, a block of lanes against all the lanes it meets, 32 or 64 at a time; no matrix
 * of scores is ever in memory. Forward and dq go over the keys of a block of queries; dk and dv over the queries of a block of keys,
 * of every query head that reads them. Scores are computed anew in each.
 */
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import type { Made, Use } from "../kernel.ts";
import { type Binding, bound, type Entry, float, fold, header, scalar, scratchBytes, vector } from "./text.ts";

export const attention: Readonly<Record<string, (use: Use) => Made>> = { attention: forward, attention_grad: backward };

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

function forward(use: Use): Made {
  return made(use, [
    {
      entry: use.name,
      by: "queries",
      scores: [{ name: "s", row: "q", column: "k" }],
      sums: [{ name: "s", column: "v", to: "o" }],
      buffers: ["q", "k", "v", "o", "lse"].map((name) => operand(use, name)),
      start: "start",
    },
  ]);
}

function backward(use: Use): Made {
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
  const reads = [...["dy", "q", "k", "v", "lse"].map((name) => operand(use, name)), { arg: "scratch+0", name: "dots", type: "f32" }];
  return made(use, [
    {
      entry: `${use.name}_dq`,
      by: "queries",
      scores: scores("q"),
      sums: [{ name: "w", column: "k", to: "dq" }],
      buffers: [...reads, operand(use, "dq")],
      start: "start",
    },
    {
      entry: `${use.name}_dkv`,
      by: "keys",
      scores: scores("k"),
      sums: [
        { name: "s", column: "dy", to: "dv" },
        { name: "w", column: "q", to: "dk" },
      ],
      buffers: [...reads, operand(use, "dk"), operand(use, "dv")],
      start: "start_keys",
    },
  ]);
}

const runOf = (use: Use): 1 | 4 => (use.d.C! % 4 === 0 ? 4 : 1);
const operand = (use: Use, name: string): Binding => ({
  arg: name,
  type: name === "lse" ? "f32" : vector(scalar(use.dtype[name]!), runOf(use)),
});

/** Rows and threads across of a block: 4 x 4 scores per thread, and per thread at most 64 sums of each kind where C is at most 256. */
function blockOf({ d }: Use): { rows: number; across: number } {
  const { B, S, U, G, M, C } = d as Record<string, number>;
  const across = C! > 128 ? 16 : 8;
  // the fewer rows, the more often the other side is read; the more, the fewer blocks there are to run at once
  const blocks = (rows: number) => B! * G! * Math.min(M! * Math.ceil(S! / rows), Math.ceil(U! / rows));
  const rows = [64, 32].find((r) => r * across <= 512 && Math.max(S!, U!) > r / 2 && blocks(r) >= 128);
  return { rows: rows ?? (Math.max(S!, U!) > 16 ? 32 : 16), across };
}

function made(use: Use, passes: readonly Pass[]): Made {
  const { B, S, U, G, M, C } = use.d as Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C", number>>;
  invariant(use.keeps.size === 0, `${use.op} adds to nothing`);
  const { rows, across } = blockOf(use);
  const columns = across * 4;
  const threads = (rows / 4) * across;
  const channelWords = Math.ceil(C / 4);
  const step = [STEP, 8, 4].find((s) => channelWords % (s / 4) === 0)!;
  const gradient = passes.length > 1;
  const stageWords = Math.max(step * (rows / 4 + across), threads, channelWords);
  // as many columns of the summed operand as the stage holds, a power of two
  const lanes = Math.min(columns, 2 ** Math.floor(Math.log2(stageWords / channelWords)));
  const count = B * S * G * M;
  const main = passes.map((p): Entry => {
    const { entry, buffers, start } = p;
    return { entry, grid: places(p), threads, buffers, starts: ["S"], uniform: start };
  });
  const dots: Entry = {
    entry: `${use.name}_dots`,
    grid: Math.ceil(count / DOT_THREADS),
    threads: DOT_THREADS,
    buffers: [operand(use, "dy"), operand(use, "o"), { arg: "scratch+0", name: "dots_out", type: "f32" }],
  };
  const entries = gradient ? [dots, ...main] : main;
  const outputs = passes.flatMap((p) => p.sums.map((s) => s.to));
  const { bindings, launches } = bound(entries);
  const source = render("wgsl/attention.wgsl", {
    ...{ header: header(use.dtype), bindings, name: use.name, gradient, threads, rows, columns, across, lanes },
    ...{
      channels: C,
      channelsWide: channelWords * 4,
      channelWords,
      step,
      stageWords,
      weightWords: (columns * rows) / 4,
      rowWords: rows / 4,
    },
    ...{ rowRuns: (rows * step) / 4, columnRuns: (columns * step) / 4, runsOfStep: step / 4, columnsAt: (step * rows) / 4 },
    ...{ laneRuns: lanes * channelWords, scale: float(1 / Math.sqrt(C)) },
    ...{ dotThreads: DOT_THREADS, dotIndex: fold(dots.grid as number).index, dotCount: count },
    loaders: Object.keys(use.dtype)
      .filter((name) => name !== "lse" && !outputs.includes(name))
      .map((name) => ({ name, ...lie(use, name), value: loaded(use, name) })),
    writers: outputs.map((name) => ({ name, ...lie(use, name), text: written(use, name) })),
    passes: passes.map((p) => passText(p)),
  });
  return { source, launches, ...(gradient ? { scratch: scratchBytes(count) } : {}) };

  function places({ by }: Pass): number {
    return by === "queries" ? B * G * M * Math.ceil(S / rows) : B * G * Math.ceil(U / rows);
  }

  function passText(p: Pass) {
    const byQueries = p.by === "queries";
    const heads = byQueries ? G * M : G;
    const blocks = Math.ceil((byQueries ? S : U) / rows);
    const queryAt = (head: string) => `(batch * ${S * G * M}u + ${head}) * ${C}u`;
    const keyAt = (head: string) => `(batch * ${U * G}u + ${head}) * ${C}u`;
    const groups = Array.from({ length: Math.ceil(channelWords / across) }, (_, g) => g);
    // the last run of threads may have fewer channels than threads: they repeat the last, and do not store
    const word = (g: number) => {
      const at = g ? `tx + ${g * across}u` : "tx";
      return (g + 1) * across > channelWords ? `min(${at}, ${channelWords - 1}u)` : at;
    };
    const sum = (to: string, i: number, g: number) => `sum_${to}${i}_${g}`;
    const each = (to: string) => LETTERS.flatMap((letter, i) => groups.map((g) => ({ letter, g, sum: sum(to, i, g) })));
    return {
      ...{ entry: p.entry, index: fold(places(p)).index, places: places(p), byQueries, gradient, online: !gradient, start: p.start },
      block: byQueries ? `${blocks - 1}u - place / ${B * heads}u` : `place / ${B * heads}u`,
      ...{ heads: B * heads, headsOfOne: heads, queries: S, keys: U, queryHeads: G * M, group: M },
      mine: byQueries ? queryAt("head") : keyAt("head"),
      other: byQueries ? keyAt(M > 1 ? `head / ${M}u` : "head") : queryAt("query_head"),
      sums: p.sums.flatMap(({ to }) => each(to).map((s) => s.sum)),
      scores: p.scores.map(({ name, row, column }) => ({
        row,
        column,
        products: LETTERS.map((letter, j) => ({ name: `${name}${j}`, letter })),
      })),
      four: LETTERS.map((letter, number) => ({ letter, number })),
      shrinks: p.sums.flatMap(({ to }) => each(to)),
      weighted: p.sums.map(({ name, column, to }) => ({
        column,
        words: LETTERS.map((_, number) => ({ number, name: `${name}${number}` })),
        reads: groups.map((g) => ({ name: `value${g}`, at: word(g) })),
        adds: each(to).map(({ letter, g, sum }) => ({ sum, letter, value: `value${g}` })),
      })),
      results: p.sums.flatMap(({ to }) =>
        each(to).map(({ letter, g, sum }) => ({
          to,
          letter,
          c: `(tx + ${g * across}u) * 4u`,
          value: gradient ? sum : `${sum} / total.${letter}`,
        })),
      ),
    };
  }
}

/** How lanes lie: the last, and elements from one to the next. */
function lie({ d }: Use, name: string): { last: number; stride: number } {
  const { S, U, G, M, C } = d as Readonly<Record<"S" | "U" | "G" | "M" | "C", number>>;
  const ofKey = ["k", "v", "dk", "dv"].includes(name);
  return ofKey ? { last: U - 1, stride: G * C } : { last: S - 1, stride: G * M * C };
}
function loaded(use: Use, name: string): string {
  if (runOf(use) === 4) return `vec4<f32>(${name}[i / 4u])`;
  const { C } = use.d;
  // the last channel stands for those past it, which count as zero
  const one = (j: number) => `select(0.0, f32(${name}[i - c + min(c + ${j}u, ${C! - 1}u)]), c + ${j}u < ${C}u)`;
  return `vec4<f32>(${[0, 1, 2, 3].map(one).join(", ")})`;
}
function written(use: Use, name: string): string {
  const type = scalar(use.dtype[name]!);
  if (runOf(use) === 4) return `  ${name}[i / 4u] = vec4<${type}>(sum);`;
  const store = (j: number) => `${name}[i + ${j}u] = ${type}(sum.${LETTERS[j]});`;
  return [0, 1, 2, 3].map((j) => (j ? `  if (c + ${j}u < ${use.d.C}u) { ${store(j)} }` : `  ${store(j)}`)).join("\n");
}
