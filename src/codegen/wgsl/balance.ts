/** What balances a router: counts of its choices, choices that are even by themselves, and the step of what goes by either. */
import { render } from "../../../templates/bindings.ts";
import type { Made, Use } from "../kernelSpec.ts";
import { bestExperts, bestTokens } from "./choice.ts";
import { columnSum, scalarSum, THREADS, totalOver } from "./reduce.ts";
import { type Entry, float, kernel, scalar, scratchBytes } from "./text.ts";

/** How many of the tokens of each batch chose each expert, to `n`; to its row of the number that the attribute `row` says. */
function count(use: Use, batches: number, tokens: number, row?: string): Made {
  const counts = columnSum(use, {
    ...{ out: "n", batches, rows: tokens, width: use.d.E!, first: 0, buffers: [{ arg: "c", type: "f32" }], term: "c[at]" },
    ...(row !== undefined && { row }),
  });
  return kernel(use, counts.entries, [counts.text], scratchBytes(counts.words));
}

/** A few numbers per expert: one workgroup is enough. */
function oneGroup(use: Use, args: readonly string[], body: (values: { entry: string; threads: number; experts: number }) => string): Made {
  const buffers = args.map((arg) => ({ arg, name: `${arg}_buf`, type: "f32" }));
  const entry: Entry = { entry: use.name, grid: 1, threads: THREADS, buffers };
  return kernel(use, [entry], [totalOver(THREADS), body({ entry: use.name, threads: THREADS, experts: use.d.E! })]);
}

/** One workgroup a microbatch turns until it is even. Scratch: the factors of its tokens. */
function sinkhorn(use: Use): Made {
  const { A, P, S, E, most } = use.d;
  const tokens = P! * S!;
  // few experts: several invocations share a column
  const parts = Math.max(1, Math.floor(THREADS / E!));
  const entry: Entry = {
    ...{ entry: use.name, grid: [A!, 1, 1], threads: THREADS },
    buffers: [
      { arg: "x", type: scalar(use.dtype.x!) },
      { arg: "y", type: "f32" },
      { arg: "rounds", type: "atomic<i32>" },
      { arg: "scratch+0", name: "rows", type: "f32" },
    ],
  };
  const text = render("wgsl/sinkhorn.wgsl", {
    ...{ entry: use.name, threads: THREADS, experts: E!, tokens, parts, shares: parts * E!, most: most! },
    ...{ perToken: float(1 / tokens), perExpert: float(1 / E!) },
  });
  return kernel(use, [entry], [totalOver(THREADS), text], scratchBytes(A! * tokens));
}

/** What each token must exceed, what of each expert's surpluses is the quantile, and their mean. */
function quantile(use: Use): Made {
  const { A, P, S, E, k, count: microbatches } = use.d;
  const tokens = P! * S!;
  const first = A! * tokens;
  const least = bestExperts(use, {
    entry: `${use.name}_least`,
    k: k! + 1,
    sign: -1,
    groups: 1,
    to: { arg: "scratch+0", type: "f32" },
    threshold: true,
  });
  const select = bestTokens(
    { op: use.op, name: `${use.name}_select` },
    {
      ...{ groups: A!, pieces: 1, sequences: P!, length: S!, experts: E!, count: Math.floor((tokens * k!) / E!) + 1, bits: 32 },
      buffers: [
        { arg: "x", type: scalar(use.dtype.x!) },
        { arg: "scratch+0", name: "numbers", type: "f32" },
      ],
      // bits of floats in the order of integers: those of negative ones are turned around
      key: "let bits = bitcast<u32>(f32(x[at]) - numbers[token]); return bits ^ (select(0u, 0xffffffffu, bits >> 31u == 1u) | 0x80000000u);",
      last: `numbers[${first}u + column] = bitcast<f32>(select(~key, key ^ 0x80000000u, key >> 31u == 1u));`,
    },
  );
  const sum = columnSum(use, {
    ...{ out: "q", batches: 1, rows: A!, width: E!, first: first + A! * E!, buffers: [] },
    term: `sums[${first}u + at] * ${float(1 / microbatches!)}`,
  });
  return kernel(use, [least.entry, select.entry, ...sum.entries], [least.text, select.text, sum.text], scratchBytes(sum.words));
}

export const balance = {
  tally: (use: Use): Made => count(use, use.d.A!, use.d.P! * use.d.S!),
  loads: (use: Use): Made => count(use, 1, use.d.B! * use.d.S!),
  dropped_rows: (use: Use): Made =>
    scalarSum(use, {
      buffers: ["c", "d"].map((arg) => ({ arg, type: "f32" })),
      ...{ count: use.size.c!, term: "c[i] * (1.0 - d[i])", factor: "1.0" },
    }),
  expert_loads: (use: Use): Made => count(use, 1, use.d.B! * use.d.S!, "row"),
  running_mean: (use: Use): Made =>
    oneGroup(use, ["n", "mean", "total"], (v) => render("wgsl/running_mean.wgsl", { ...v, choices: float(use.d.choices!) })),
  bias_update: (use: Use): Made =>
    oneGroup(use, ["n", "scale", "bias"], (v) => render("wgsl/bias_update.wgsl", { ...v, rate: float(use.d.rate!) })),
  quantile_update: (use: Use): Made =>
    oneGroup(use, ["n", "scale", "bias"], (v) =>
      render("wgsl/quantile_update.wgsl", { ...v, ema: float(use.d.ema!), rest: float(1 - use.d.ema!) }),
    ),
  ...{ sinkhorn, quantile },
};
