/** What is reduced over a row in registers: a router's scores and weights of a token, their losses; and rows' activation gradient. */
import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import type { CudaMaker, Made, Use } from "../kernelSpec.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
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
  gated_grad: (use) =>
    makeRows(use, {
      ...{ width: use.d.C!, inputs: ["x", "dy"], perRow: ["gate"] },
      stages: [{ name: "sum", op: "Sum", term: "x * dy", after: ["const float s = sigmoid(gate);"] }],
      outputs: { dx: "dy * s" },
      rowOutputs: { dgate: "sum * s * (1.0f - s)" },
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
  weigh: (use) =>
    makeRows(use, {
      ...{ width: use.d.E!, inputs: ["p", "c"], stages: use.d.normalize ? [share(use)] : [] },
      outputs: { y: use.d.normalize ? "c * p * share" : `c * p * ${f32(use.d.scale!)}` },
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
        : { width: use.d.E!, inputs: ["c", "dy"], stages: [], outputs: { dp: `c * dy * ${f32(use.d.scale!)}` } },
    ),
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
  ...{ name: "sum", op: "Sum", term: "c * p", after: [`const float share = ${f32(d.scale!)} / (sum + 1e-20f);`] },
});
