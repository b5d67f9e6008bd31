/** Kernels of embedding and loss that are not elementwise: reductions over a row of logits and the gradient of the embedding. */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { scalarSum, THREADS, totalOver } from "./reduce.ts";
import {
  type Binding,
  type EntryPoint,
  float,
  foldGrid,
  horizontal,
  kernel,
  lanesOf,
  scalar,
  scratchBytes,
  vector,
  widthOf,
} from "./text.ts";

interface RowNumber {
  readonly inputs: readonly string[];
  readonly out: string;
  readonly initial: string;
  /** The next value of `acc`, an expression of `acc` and `v`. */
  readonly step: string;
  readonly before?: readonly string[];
  readonly max?: true;
  /** Further buffers, and statements that one invocation of a row runs after the reduction; they may read the start of V. */
  readonly beside?: readonly Binding[];
  readonly after?: readonly string[];
}

/** Reduces each row of V logits to one value. */
function perRow(spec: KernelSpec, { inputs, out, initial, step, before = [], max, beside = [], after = [] }: RowNumber): GeneratedKernel {
  const columns = spec.d.V!;
  const rows = spec.size.x! / columns;
  const wide = widthOf(columns);
  const lanes = lanesOf(columns / wide, THREADS);
  const groups = Math.ceil((rows * lanes) / THREADS);
  const parts = ["x", "y", "z", "w"].slice(0, wide).map((part) => `acc.${part}`);
  const entry: EntryPoint = {
    ...{ entry: spec.name, grid: groups, threads: THREADS },
    buffers: [
      { arg: "x", type: vector(scalar(spec.dtype.x!), wide) },
      ...inputs.map((arg) => ({ arg, type: "f32" })),
      { arg: out, type: "f32" },
      ...beside,
    ],
    ...(after.length ? { starts: ["V"] } : {}),
  };
  const text = render("wgsl/vocab_row.wgsl", {
    ...{ op: spec.op, entry: spec.name, threads: THREADS, lanes, columns, vectors: columns / wide, perGroup: THREADS / lanes, rows },
    ...{ index: foldGrid(groups).index, vector: vector("f32", wide), before: [...before], after: [...after], initial, step, out },
    horizontal: max && wide > 1 ? parts.reduce((a, b) => `max(${a}, ${b})`) : horizontal("acc", wide),
  });
  return kernel(spec, [entry], [totalOver(lanes, max ? { combine: "max(a, b)" } : {}), text]);
}

/** Links the tokens of each id in one workgroup and in linear time; then sums the rows of each id in order. */
function embedGrad(spec: KernelSpec): GeneratedKernel {
  const { V: ids, D } = spec.d as Readonly<Record<"V" | "D", number>>;
  const tokens = spec.size.ids!;
  const wide = widthOf(D);
  const vectors = D / wide;
  const clears = !spec.accumulates.has("dtable");
  const cleared = ids * vectors;
  const [groups, clearGroups] = [Math.ceil((tokens * vectors) / THREADS), Math.ceil(cleared / THREADS)];
  const type = vector("f32", wide);
  const links = { arg: scratchStart, type: "i32" };
  const entries: EntryPoint[] = [
    {
      ...{ entry: `${spec.name}_link`, grid: [1, 1, 1], threads: THREADS, starts: ["V"] },
      buffers: [
        { arg: "ids", type: "i32" },
        { ...links, name: "links" },
      ],
    },
    {
      ...{ entry: spec.name, grid: groups, threads: THREADS, starts: ["V"], uniform: "start_at" },
      buffers: [
        { arg: "ids", name: "token_ids", type: "i32" },
        { arg: "dy", type: vector(scalar(spec.dtype.dy!), wide) },
        { arg: "dtable", type },
        { ...links, name: "linked" },
      ],
    },
  ];
  const clear: EntryPoint = {
    ...{ entry: `${spec.name}_clear`, grid: clearGroups, threads: THREADS },
    buffers: [{ arg: "dtable", name: "cleared", type }],
  };
  const text = render("wgsl/embed_grad.wgsl", {
    ...{ entry: spec.name, threads: THREADS, clears, clearIndex: foldGrid(clearGroups).index, cleared, type },
    ...{ ids, tokens, firstAt: ids + tokens, width: wide, vectors, index: foldGrid(groups).index },
  });
  return kernel(spec, clears ? [clear, ...entries] : entries, [text], scratchBytes(ids + 2 * tokens));
}

export const vocab = {
  // the lowest f32, below any logit
  row_max: (spec: KernelSpec): GeneratedKernel =>
    perRow(spec, { inputs: [], out: "m", initial: "-0x1.fffffep+127", step: "max(acc, v)", max: true }),
  softmax_terms(spec: KernelSpec): GeneratedKernel {
    const columns = spec.d.V!;
    const wide = widthOf(columns);
    const logit = wide > 1 ? `x[first + u32(v) / ${wide}u][u32(v) % ${wide}u]` : "x[first + u32(v)]";
    return perRow(spec, {
      ...{ inputs: ["m"], out: "s", initial: "0.0" },
      before: [`let largest = m[min(row, ${spec.size.m! - 1}u)];`],
      step: "acc + exp(v - largest)",
      beside: [
        { arg: "target", name: "wanted", type: "i32" },
        { arg: "p", type: "f32" },
      ],
      // another shard may hold the target
      after: [
        "let v = wanted[row] - start.x;",
        "var logit = 0.0;",
        `if (v >= 0 && v < ${columns}) {`,
        `  logit = f32(${logit});`,
        "}",
        "p[row] = logit;",
      ],
    });
  },
  embed_grad: embedGrad,
  mean: (spec: KernelSpec): GeneratedKernel =>
    scalarSum(spec, {
      ...{ buffers: [{ arg: "l", type: "f32" }], count: spec.size.l!, term: "l[i]", factor: float(1 / spec.d.count!) },
    }),
  weighted_sum: (spec: KernelSpec): GeneratedKernel =>
    scalarSum(spec, {
      buffers: ["l", "weight"].map((arg) => ({ arg, type: "f32" })),
      ...{ count: spec.size.l!, term: "l[i] * weight[i]", factor: "1.0" },
    }),
};
