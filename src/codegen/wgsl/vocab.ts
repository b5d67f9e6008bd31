/** Whatever meets the vocabulary and is no formula per element: numbers per row of logits, and the embedding's gradient. */
import { render } from "../../../templates/bindings.ts";
import type { Made, Use } from "../kernelSpec.ts";
import { scalarSum, THREADS, totalOver } from "./reduce.ts";
import { type Entry, float, fold, horizontal, kernel, lanesOf, scalar, scratchBytes, vector, widthOf } from "./text.ts";

interface RowNumber {
  readonly inputs: readonly string[];
  readonly out: string;
  readonly initial: string;
  /** What becomes of `acc` by the next `v`. */
  readonly step: string;
  readonly before?: readonly string[];
  readonly max?: true;
}

/** Of each row of V logits one number. */
function perRow(use: Use, { inputs, out, initial, step, before = [], max }: RowNumber): Made {
  const columns = use.d.V!;
  const rows = use.size.x! / columns;
  const wide = widthOf(columns);
  const lanes = lanesOf(columns / wide, THREADS);
  const groups = Math.ceil((rows * lanes) / THREADS);
  const parts = ["x", "y", "z", "w"].slice(0, wide).map((part) => `acc.${part}`);
  const entry: Entry = {
    ...{ entry: use.name, grid: groups, threads: THREADS },
    buffers: [
      { arg: "x", type: vector(scalar(use.dtype.x!), wide) },
      ...inputs.map((arg) => ({ arg, type: "f32" })),
      { arg: out, type: "f32" },
    ],
  };
  const text = render("wgsl/vocab_row.wgsl", {
    ...{ op: use.op, entry: use.name, threads: THREADS, lanes, columns, vectors: columns / wide, perGroup: THREADS / lanes, rows },
    ...{ index: fold(groups).index, vector: vector("f32", wide), before: [...before], initial, step, out },
    horizontal: max && wide > 1 ? parts.reduce((a, b) => `max(${a}, ${b})`) : horizontal("acc", wide),
  });
  return kernel(use, [entry], [totalOver(lanes, max ? { combine: "max(a, b)" } : {}), text]);
}

/** Of each token the logit of its target, or 0 where another piece holds that. */
function pick(use: Use): Made {
  const tokens = use.size.p!;
  const groups = Math.ceil(tokens / THREADS);
  const entry: Entry = {
    ...{ entry: use.name, grid: groups, threads: THREADS, starts: ["V"] },
    buffers: [
      { arg: "x", type: scalar(use.dtype.x!) },
      { arg: "target", name: "wanted", type: "i32" },
      { arg: "p", type: "f32" },
    ],
  };
  const text = render("wgsl/pick.wgsl", { entry: use.name, threads: THREADS, index: fold(groups).index, tokens, columns: use.d.V! });
  return kernel(use, [entry], [text]);
}

/** Links the tokens of each id, in one workgroup and in linear time; then every id's rows are added up in their order. */
function embedGrad(use: Use): Made {
  const { V: ids, D } = use.d as Readonly<Record<"V" | "D", number>>;
  const tokens = use.size.ids!;
  const wide = widthOf(D);
  const vectors = D / wide;
  const clears = !use.keeps.has("dtable");
  const cleared = ids * vectors;
  const [groups, clearGroups] = [Math.ceil((tokens * vectors) / THREADS), Math.ceil(cleared / THREADS)];
  const type = vector("f32", wide);
  const links = { arg: "scratch+0", type: "i32" };
  const entries: Entry[] = [
    {
      ...{ entry: `${use.name}_link`, grid: [1, 1, 1], threads: THREADS, starts: ["V"] },
      buffers: [
        { arg: "ids", type: "i32" },
        { ...links, name: "links" },
      ],
    },
    {
      ...{ entry: use.name, grid: groups, threads: THREADS, starts: ["V"], uniform: "start_at" },
      buffers: [
        { arg: "ids", name: "token_ids", type: "i32" },
        { arg: "dy", type: vector(scalar(use.dtype.dy!), wide) },
        { arg: "dtable", type },
        { ...links, name: "linked" },
      ],
    },
  ];
  const clear: Entry = {
    ...{ entry: `${use.name}_clear`, grid: clearGroups, threads: THREADS },
    buffers: [{ arg: "dtable", name: "cleared", type }],
  };
  const text = render("wgsl/embed_grad.wgsl", {
    ...{ entry: use.name, threads: THREADS, clears, clearIndex: fold(clearGroups).index, cleared, type },
    ...{ ids, tokens, firstAt: ids + tokens, width: wide, vectors, index: fold(groups).index },
  });
  return kernel(use, clears ? [clear, ...entries] : entries, [text], scratchBytes(ids + 2 * tokens));
}

export const vocab = {
  // the smallest f32: any logit is above it
  row_max: (use: Use): Made => perRow(use, { inputs: [], out: "m", initial: "-0x1.fffffep+127", step: "max(acc, v)", max: true }),
  sum_exp: (use: Use): Made =>
    perRow(use, {
      ...{ inputs: ["m"], out: "s", initial: "0.0" },
      before: [`let largest = m[min(row, ${use.size.m! - 1}u)];`],
      step: "acc + exp(v - largest)",
    }),
  pick,
  embed_grad: embedGrad,
  mean: (use: Use): Made =>
    scalarSum(use, {
      ...{ buffers: [{ arg: "l", type: "f32" }], count: use.size.l!, term: "l[i]", factor: float(1 / use.d.count!) },
    }),
  weighted_sum: (use: Use): Made =>
    scalarSum(use, {
      buffers: ["l", "weight"].map((arg) => ({ arg, type: "f32" })),
      ...{ count: use.size.l!, term: "l[i] * weight[i]", factor: "1.0" },
    }),
};
