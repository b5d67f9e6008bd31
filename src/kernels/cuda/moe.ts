/** The router: scores, choices, weights, balancing losses, a token's experts in the registers of one warp or some; and rows' activation gradient. */
import { bytesOf } from "../../../schemas/layout.ts";
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import type { CudaMaker, Made, Use } from "../kernel.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { shareRow, sumColumns } from "./norm.ts";
import { source } from "./prelude.ts";
import { addParts } from "./reduce.ts";

/** A row in registers: what is reduced over it, one after the other, and what comes of each element. */
interface RowFormula {
  readonly width: number;
  readonly inputs: readonly string[];
  readonly scalars?: readonly string[];
  readonly perRow?: readonly string[];
  readonly element?: readonly string[];
  readonly stages: readonly {
    readonly name: string;
    readonly op: "Sum" | "Max";
    readonly term: string;
    readonly after?: readonly string[];
  }[];
  readonly outputs?: Readonly<Record<string, string>>;
  readonly rowOutputs?: Readonly<Record<string, string>>;
  /** What a row adds to the scalar output `y`. */
  readonly part?: string;
}

const logSumExp: RowFormula["stages"] = [
  { name: "most", op: "Max", term: "x" },
  { name: "sum", op: "Sum", term: "fastExp(x - most)", after: ["const float log = most + logf(sum);"] },
];

export const moe: Readonly<Record<string, CudaMaker>> = {
  softmax: (use) => makeRows(use, { width: use.d.E!, inputs: ["x"], stages: logSumExp, outputs: { y: "fastExp(x - log)" } }),
  softmax_grad: (use) =>
    makeRows(use, {
      ...{ width: use.d.E!, inputs: ["y", "dy"] },
      stages: [{ name: "dot", op: "Sum", term: "y * dy" }],
      outputs: { dx: "y * (dy - dot)" },
    }),
  z_loss: (use) => makeRows(use, { width: use.d.E!, inputs: ["x"], stages: logSumExp, part: `${f32(use.d.c!)} * log * log` }),
  z_loss_grad: (use) =>
    makeRows(use, {
      ...{ width: use.d.E!, inputs: ["x"], scalars: ["dy"], stages: logSumExp },
      outputs: { dx: `${f32(2 * use.d.c!)} * dy * log * fastExp(x - log)` },
    }),
  swiglu_rows_grad: (use) =>
    makeRows(use, {
      ...{ width: use.d.F!, inputs: ["gate", "up", "dy"], perRow: ["p"] },
      element: ["const float s = sigmoid(gate);"],
      stages: [{ name: "slope", op: "Sum", term: "dy * gate * s * up" }],
      outputs: { dgate: "dy * p * up * s * (1.0f + gate * (1.0f - s))", dup: "dy * p * gate * s" },
      rowOutputs: { dp: "slope" },
    }),
  normalize: (use) =>
    makeRows(use, {
      width: use.d.E!,
      inputs: ["p"],
      stages: [{ name: "sum", op: "Sum", term: "p" }],
      outputs: { y: "p / (sum + 1e-20f)" },
    }),
  normalize_grad: (use) =>
    makeRows(use, {
      ...{ width: use.d.E!, inputs: ["p", "dy"] },
      stages: [
        { name: "sum", op: "Sum", term: "p" },
        { name: "dot", op: "Sum", term: "p * dy", after: ["const float share = 1.0f / (sum + 1e-20f), mean = dot * share;"] },
      ],
      outputs: { dp: "(dy - mean) * share" },
    }),
  choose,
  choose_biased: choose,
  weigh: (use) =>
    makeRows(use, {
      ...{ width: use.d.E!, inputs: ["p", "c"], stages: use.d.normalize ? [share(use)] : [] },
      outputs: { y: use.d.normalize ? "c * p * share" : `c * p * ${f32(use.d.scaling!)}` },
    }),
  weigh_grad: (use) =>
    makeRows(
      use,
      use.d.normalize
        ? {
            ...{ width: use.d.E!, inputs: ["p", "c", "dy"] },
            stages: [share(use), { name: "dot", op: "Sum", term: "c * p * dy", after: ["const float mean = dot / (sum + 1e-20f);"] }],
            outputs: { dp: "c * (dy - mean) * share" },
          }
        : { width: use.d.E!, inputs: ["c", "dy"], stages: [], outputs: { dp: `c * dy * ${f32(use.d.scaling!)}` } },
    ),
  tally,
  loads,
  running_mean: runningMean,
  bias_update: biasUpdate,
};

function makeRows(use: Use, f: RowFormula): Made {
  const type = (name: string) => cudaType(use.dtype[name]!);
  const outputs = Object.keys(f.outputs ?? {});
  const rowOutputs = Object.keys(f.rowOutputs ?? {});
  const rows = use.size[f.inputs[0]!]! / f.width;
  const types = [...f.inputs, ...outputs].map((name) => use.dtype[name]!);
  const shares = shareRow(f.width, vectorOf(f.width, types), 4);
  const grid = Math.ceil(rows / (shares.threads / shares.lanes));
  const reads = [...f.inputs, ...(f.scalars ?? []), ...(f.perRow ?? [])];
  const writes = [...outputs, ...rowOutputs];
  const ragged = use.bound > 0;
  const body = render("cuda/rows.cu", {
    ...{ name: use.name, ...shares, width: f.width, end: ragged ? "rows[0]" : rows },
    params: [
      ...reads.map((name) => `const ${type(name)}* ${name}At`),
      ...writes.map((name) => `${type(name)}* ${name}At`),
      ...(ragged ? ["const int* rows"] : []),
      ...(f.part ? ["float* partial"] : []),
    ].join(", "),
    inputs: f.inputs.map((name) => ({ name, type: type(name) })),
    ...{ scalars: f.scalars ?? [], perRow: f.perRow ?? [], element: f.element ?? [] },
    stages: f.stages.map((s) => ({ ...s, after: s.after ?? [] })),
    outputs: outputs.map((name) => ({ name, value: f.outputs![name]! })),
    rowOutputs: rowOutputs.map((name) => ({ name, type: type(name), value: f.rowOutputs![name]! })),
    part: f.part ?? "",
  });
  const last = f.part ? addParts(use, grid, "y") : undefined;
  return {
    source: source(use, [body, last?.body].join("\n")),
    ...(last ? { scratch: grid * bytesOf.f32 } : {}),
    launches: [
      {
        ...{ entry: use.name, grid: [grid, 1, 1], threads: shares.threads, shared: 0 },
        args: [...reads, ...writes, ...(ragged ? ["rows"] : []), ...(f.part ? ["scratch+0"] : [])],
      },
      ...(last ? [last.launch] : []),
    ],
  };
}

/** What each chosen weight is multiplied by, so that they sum to the scaling factor. */
const share = ({ d }: Use): RowFormula["stages"][number] => ({
  ...{ name: "sum", op: "Sum", term: "c * p", after: [`const float share = ${f32(d.scaling!)} / (sum + 1e-20f);`] },
});

function choose(use: Use): Made {
  const { E, k, sign = 0, groups = 1, group_top_k = 1, group_scores = 0 } = use.d;
  const rows = use.size.x! / E!;
  // one warp at most, whatever it has to hold
  const { lanes, ...shares } = shareRow(E!, vectorOf(E!, [use.dtype.x!, use.dtype.c!]), Number.POSITIVE_INFINITY);
  invariant(k! <= E!, `${k} of ${E} experts`);
  const bias = use.dtype.bias !== undefined;
  const body = render("cuda/choose.cu", {
    ...{ name: use.name, ...shares, lanes, width: E!, rows, k: k!, x: cudaType(use.dtype.x!), bias, sign: f32(sign) },
    ...{ grouped: groups > 1, groups, groupSize: E! / groups, groupTopK: group_top_k, groupScores: group_scores },
  });
  const grid: [number, number, number] = [Math.ceil(rows / (shares.threads / lanes)), 1, 1];
  const args = ["x", ...(bias ? ["bias"] : []), "c"];
  return { source: source(use, body), launches: [{ entry: use.name, grid, threads: shares.threads, shared: 0, args }] };
}

function tally(use: Use): Made {
  const { P, S, A } = use.d;
  return count(use, { batches: A!, tokens: P! * S! });
}
function loads(use: Use): Made {
  return count(use, { batches: 1, tokens: use.d.B! * use.d.S! });
}

/** How many of the tokens of each batch chose each expert, to `n`. */
function count(use: Use, { batches, tokens }: { readonly batches: number; readonly tokens: number }): Made {
  const E = use.d.E!;
  invariant(E <= 1024, `counts of ${E} experts`);
  const threads = E > 256 ? 1024 : 256;
  const active = Math.floor(threads / E) * E;
  // some 32 elements a thread
  const each = 32 * (active / E);
  const chunks = Math.ceil(tokens / each);
  const body = render("cuda/tally.cu", {
    ...{ name: use.name, threads, active, tokens: each, experts: E, batch: tokens * E, batches },
  });
  const sum = sumColumns(use, { rows: chunks, width: batches * E, to: "n", type: cudaType(use.dtype.n!) });
  return {
    source: source(use, `${body}\n${sum.body}`),
    scratch: chunks * batches * E * bytesOf.f32,
    launches: [{ entry: use.name, grid: [chunks, batches, 1], threads, shared: 0, args: ["c", "scratch+0"] }, sum.launch],
  };
}

function runningMean(use: Use): Made {
  const threads = 1024;
  const body = render("cuda/running_mean.cu", { name: use.name, threads, experts: use.d.E!, choices: f32(use.d.choices!) });
  return { source: source(use, body), launches: [{ entry: use.name, grid: [1, 1, 1], threads, shared: 0, args: ["n", "mean", "total"] }] };
}

function biasUpdate(use: Use): Made {
  const threads = 1024;
  const body = render("cuda/bias_update.cu", { name: use.name, threads, experts: use.d.E!, rate: f32(use.d.rate!) });
  return { source: source(use, body), launches: [{ entry: use.name, grid: [1, 1, 1], threads, shared: 0, args: ["n", "bias"] }] };
}
