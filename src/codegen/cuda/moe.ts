/** Kernels that reduce over a row held in registers: router scores and combine weights of a token, router losses, and the activation gradient of rows of experts. */
import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import { gatedUnitText, perGatedUnit } from "../gatedUnitText.ts";
import type { CudaGenerator, GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
import { source } from "./prelude.ts";
import { addParts } from "./reduce.ts";

/** The formula of a row kernel: reductions over the row in sequence, then the outputs per element. */
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
  /** The addend of a row to the scalar output `y`. */
  readonly part?: string;
}

const logSumExp: RowFormula["stages"] = [
  { name: "most", op: "Max", term: "x" },
  { name: "sum", op: "Sum", term: "fastExp(x - most)", after: ["const float log = most + logf(sum);"] },
];

export const moe: Readonly<Record<string, CudaGenerator>> = {
  softmax: (spec) => makeRows(spec, { width: spec.d.E!, inputs: ["x"], stages: logSumExp, outputs: { y: "fastExp(x - log)" } }),
  softmax_grad: (spec) =>
    makeRows(spec, {
      ...{ width: spec.d.E!, inputs: ["y", "dy"] },
      stages: [{ name: "dot", op: "Sum", term: "y * dy" }],
      outputs: { dx: "y * (dy - dot)" },
    }),
  z_loss: (spec) => makeRows(spec, { width: spec.d.E!, inputs: ["x"], stages: logSumExp, part: `${f32(spec.d.c!)} * log * log` }),
  z_loss_grad: (spec) =>
    makeRows(spec, {
      ...{ width: spec.d.E!, inputs: ["x"], scalars: ["dy"], stages: logSumExp },
      outputs: { dx: `${f32(2 * spec.d.c!)} * dy * log * fastExp(x - log)` },
    }),
  ...perGatedUnit("rowsGrad", (unit) => (spec: KernelSpec) => {
    const { argument, slope } = gatedUnitText(unit, "gate", f32);
    return makeRows(spec, {
      ...{ width: spec.d.F!, inputs: ["gate", "up", "dy"], perRow: ["p"] },
      element: [`const float s = sigmoid(${argument});`],
      stages: [{ name: "slope", op: "Sum", term: "dy * gate * s * up" }],
      outputs: { dgate: `dy * p * up * ${slope}`, dup: "dy * p * gate * s" },
      rowOutputs: { dp: "slope" },
    });
  }),
  sigmoid_gate_grad: (spec) =>
    makeRows(spec, {
      ...{ width: spec.d.C!, inputs: ["x", "dy"], perRow: ["gate"] },
      stages: [{ name: "sum", op: "Sum", term: "x * dy", after: ["const float s = sigmoid(gate);"] }],
      outputs: { dx: "dy * s" },
      rowOutputs: { dgate: "sum * s * (1.0f - s)" },
    }),
  normalize: (spec) =>
    makeRows(spec, {
      width: spec.d.E!,
      inputs: ["p"],
      stages: [{ name: "sum", op: "Sum", term: "p" }],
      outputs: { y: "p / (sum + 1e-20f)" },
    }),
  normalize_grad: (spec) =>
    makeRows(spec, {
      ...{ width: spec.d.E!, inputs: ["p", "dy"] },
      stages: [
        { name: "sum", op: "Sum", term: "p" },
        { name: "dot", op: "Sum", term: "p * dy", after: ["const float share = 1.0f / (sum + 1e-20f), mean = dot * share;"] },
      ],
      outputs: { dp: "(dy - mean) * share" },
    }),
  combine_weights: (spec) =>
    makeRows(spec, {
      ...{ width: spec.d.E!, inputs: ["p", "c"], stages: spec.d.normalize ? [share(spec)] : [] },
      outputs: { y: spec.d.normalize ? "c * p * share" : `c * p * ${f32(spec.d.scale!)}` },
    }),
  combine_weights_grad: (spec) =>
    makeRows(
      spec,
      spec.d.normalize
        ? {
            ...{ width: spec.d.E!, inputs: ["p", "c", "dy"] },
            stages: [share(spec), { name: "dot", op: "Sum", term: "c * p * dy", after: ["const float mean = dot / (sum + 1e-20f);"] }],
            outputs: { dp: "c * (dy - mean) * share" },
          }
        : { width: spec.d.E!, inputs: ["c", "dy"], stages: [], outputs: { dp: `c * dy * ${f32(spec.d.scale!)}` } },
    ),
};

function makeRows(spec: KernelSpec, f: RowFormula): GeneratedKernel {
  const type = (name: string) => cudaType(spec.dtype[name]!);
  const outputs = Object.keys(f.outputs ?? {});
  const rowOutputs = Object.keys(f.rowOutputs ?? {});
  const rows = spec.size[f.inputs[0]!]! / f.width;
  const types = [...f.inputs, ...outputs].map((name) => spec.dtype[name]!);
  const shares = shareRow(f.width, vectorOf(f.width, types), 4);
  const grid = Math.ceil(rows / (shares.threads / shares.lanes));
  const reads = [...f.inputs, ...(f.scalars ?? []), ...(f.perRow ?? [])];
  const writes = [...outputs, ...rowOutputs];
  const ragged = spec.bound > 0;
  const body = render("cuda/rows.cu", {
    ...{ name: spec.name, ...shares, width: f.width, end: ragged ? "rows[0]" : rows },
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
  const last = f.part ? addParts(spec, grid, "y") : undefined;
  return {
    source: source(spec, [body, last?.body].join("\n")),
    ...(last ? { scratch: grid * bytesOf.f32 } : {}),
    launches: [
      {
        ...{ entry: spec.name, grid: [grid, 1, 1], threads: shares.threads, shared: 0 },
        args: [...reads, ...writes, ...(ragged ? ["rows"] : []), ...(f.part ? [scratchStart] : [])],
      },
      ...(last ? [last.launch] : []),
    ],
  };
}

/** The factor by which the chosen weights sum to the scaling factor. */
const share = ({ d }: KernelSpec): RowFormula["stages"][number] => ({
  ...{ name: "sum", op: "Sum", term: "c * p", after: [`const float share = ${f32(d.scale!)} / (sum + 1e-20f);`] },
});
