/**
 * CUDA kernels of ops with a formula. Without reductions they are elementwise. Reductions over a row keep the row in registers, or read a
 * long row once if only values per row result. Totals are sums in two launches.
 */

import type { Arch } from "../../../schemas/devices.ts";
import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import type { OpName } from "../../../schemas/opNames.ts";
import { render } from "../../../templates/bindings.ts";
import { type Access, isTotal, layoutOf, type OperandLayout, operandsOf, productOf, type Total } from "../../ops/formula.ts";
import { type AnyFormulaOp, invariant } from "../../ops/op.ts";
import { type FormulaText, formulaText, strength } from "../formulaText.ts";
import { type CudaGenerator, cudaKernel, type GeneratedKernel, type KernelOperand, type KernelSpec, operandOf } from "../kernelSpec.ts";
import { type KernelArg, rowIndex, scratchStart, startOf } from "../launchArgs.ts";
import { makeElementwise } from "./elementwise.ts";
import { addPartials, makeSum } from "./reduce.ts";
import { makeElementwiseList, makeSumList } from "./tensorLists.ts";
import { cuda, f32, shareRow, source, vectorOf } from "./text.ts";

/** Generates the kernel of an op from its formula. */
export const formulaKernel = <N extends OpName>(op: AnyFormulaOp<N>): CudaGenerator<N> => {
  const layout = layoutOf(op);
  return cudaKernel(op, (spec, arch) => {
    const results = op.formula(operandsOf(layout), spec.d);
    const [first, ...others] = Object.values(results);
    if (first !== undefined && isTotal(first)) {
      invariant(others.length === 0, `${spec.op} has a total and another result`);
      return totalKernel(spec, arch, layout, first);
    }
    const text = formulaText(cuda, results);
    const hasElements = Object.keys(results).some((name) => layout.access.get(name)?.kind === "element");
    invariant(!text.hasColumn || (text.stages.length > 0 && !hasElements), `${spec.op} reads the index of a column outside of a reduction`);
    if (text.stages.length === 0) return elementwiseKernel(spec, arch, layout, text);
    return hasElements ? rowKernel(spec, layout, text) : rowReduction(spec, layout, text);
  });
};

/** The operands that a formula reads, by access, in the order of the signature. */
function readsOf(spec: KernelSpec, layout: OperandLayout, { reads }: Pick<FormulaText, "reads">) {
  const all = [...layout.access].filter(([name]) => reads.has(name)).map(([name, access]) => ({ ...operandOf(spec, name), access }));
  return (kind: Access["kind"]) => all.filter(({ access }) => access.kind === kind);
}
const resultsOf = (spec: KernelSpec, layout: OperandLayout, { results }: FormulaText, kind: Access["kind"]) =>
  [...results]
    .filter(([name]) => layout.access.get(name)?.kind === kind)
    .map(([name, { text }]) => ({ ...operandOf(spec, name), value: text }));

/** The index into a table, as an offset to the pointer, of the element where vector `at` begins. */
function tableIndex(access: Access, spec: KernelSpec): { readonly width: number; readonly offset: string } {
  invariant(access.kind === "table", "only a table repeats along the elements");
  const width = productOf(access.width, spec.d);
  const within = `int(at % (${width} / N)) * N`;
  // a table of one row serves all elements
  if (!access.hasRows) return { width, offset: within };
  return { width, offset: `i64(at / (${productOf(access.batch, spec.d)} / N)) * ${width} + ${within}` };
}

function elementwiseKernel(spec: KernelSpec, arch: Arch, layout: OperandLayout, text: FormulaText): GeneratedKernel {
  const reads = readsOf(spec, layout, text);
  const perRow = reads("row");
  const tables = reads("table").map((o) => ({ ...o, ...tableIndex(o.access, spec) }));
  const width = perRow.length ? productOf(layout.rowDims, spec.d) : tables[0]?.width;
  const [first, ...more] = resultsOf(spec, layout, text, "element");
  invariant(first !== undefined && 1 + more.length === text.results.size, `${spec.op} has results per row without a reduction`);
  const make = spec.tensors === undefined ? makeElementwise : makeElementwiseList;
  return make(spec, arch, {
    streams: [
      ...reads("element"),
      ...tables.map(({ name, offset, ...o }) => ({ ...o, name, load: `${name}In[k] = ${name}In[k].load(${name}At + ${offset});` })),
    ],
    ...{ scalars: reads("launch"), indexed: perRow, ...(width === undefined ? {} : { width }), once: text.once, element: text.element },
    row: [...perRow.map(({ name }) => `const float ${name} = widen(${name}At[row]);`), ...text.row],
    outputs: [first, ...more],
  });
}

/** A row in the registers of some threads of one block; `total` is an addend of the scalar output per row. */
function rowKernel(
  spec: KernelSpec,
  layout: OperandLayout,
  text: FormulaText,
  total?: { readonly to: string; readonly addend: string },
): GeneratedKernel {
  const reads = readsOf(spec, layout, text);
  const [inputs, scalars, perRow] = [reads("element"), reads("launch"), reads("row")];
  invariant(reads("table").length === 0 && text.once.length === 0, `${spec.op} reads a table or scalars along a row`);
  const [outputs, rowOutputs] = total ? [[], []] : [resultsOf(spec, layout, text, "element"), resultsOf(spec, layout, text, "row")];
  const width = productOf(layout.rowDims, spec.d);
  const rows = operandOf(spec, layout.full.name).size / width;
  const shares = shareRow(
    width,
    vectorOf(
      width,
      [...inputs, ...outputs].map((o) => o.dtype),
    ),
    4,
  );
  const grid = Math.ceil(rows / (shares.threads / shares.lanes));
  const [read, written] = [
    [...inputs, ...scalars, ...perRow],
    [...outputs, ...rowOutputs],
  ];
  const ragged = spec.bound > 0;
  const typed = ({ name, dtype }: KernelOperand) => ({ name, type: cudaType(dtype) });
  const names = (of: readonly KernelOperand[]) => of.map((o) => o.name);
  const [firstStage, ...stages] = text.stages;
  const body = render("cuda/rows.cu", {
    ...{ name: spec.name, ...shares, width, end: ragged ? "rows[0]" : rows },
    params: [
      ...read.map((o) => `const ${cudaType(o.dtype)}* ${o.name}At`),
      ...written.map((o) => `${cudaType(o.dtype)}* ${o.name}At`),
      ...(ragged ? ["const int* rows"] : []),
      ...(total ? ["float* partial"] : []),
    ].join(", "),
    inputs: inputs.map(typed),
    ...{ scalars: names(scalars), perRow: names(perRow), element: text.element },
    // statements per row that need no reduction follow the first
    stages: (firstStage ? [{ ...firstStage, after: [...text.row, ...firstStage.after] }, ...stages] : []).map(({ by, ...s }) => ({
      ...s,
      op: by === "sum" ? "Sum" : "Max",
    })),
    outputs: outputs.map(({ name, value }) => ({ name, value })),
    rowOutputs: rowOutputs.map((o) => ({ ...typed(o), value: o.value })),
    part: total?.addend ?? "",
  });
  const last = total && addPartials(spec, grid, operandOf(spec, total.to));
  return {
    source: source(spec, [body, last?.body].join("\n")),
    ...(last ? { scratch: grid * bytesOf.f32 } : {}),
    launches: [
      {
        ...{ entry: spec.name, grid: [grid, 1, 1], threads: shares.threads, shared: 0 },
        args: [...names(read), ...names(written), ...(ragged ? [rowIndex] : []), ...(total ? [scratchStart] : [])],
      },
      ...(last ? [last.launch] : []),
    ],
  };
}

/** What a kernel does for a row after its reduction. */
export interface CudaRowEnd {
  readonly params: readonly { readonly name: string; readonly type: string; readonly arg?: KernelArg }[];
  readonly statements: readonly string[];
}

/** Generates a kernel for one value per row, in which each thread has several vectors of the row in flight. */
export function rowReduction(
  spec: KernelSpec,
  layout: OperandLayout,
  text: FormulaText,
  { params, statements }: CudaRowEnd = { params: [], statements: [] },
): GeneratedKernel {
  const reads = readsOf(spec, layout, text);
  const [x, ...others] = reads("element");
  const [to, ...more] = resultsOf(spec, layout, text, "row");
  const [stage, ...stages] = text.stages;
  invariant(x !== undefined && to !== undefined && stage !== undefined, `${spec.op} reduces nothing`);
  invariant(others.length + more.length + stages.length === 0 && to.value === stage.name, `${spec.op} is more than one reduction`);
  const width = productOf(layout.rowDims, spec.d);
  const unroll = 4;
  const shares = shareRow(width, vectorOf(width, [x.dtype]), 2 * unroll);
  const [lanes, threads] = [Math.min(512, shares.lanes), Math.min(512, shares.threads)];
  const perRow = reads("row");
  const dim = layout.rowDims.at(-1);
  invariant(dim !== undefined, `${spec.op} has no row`);
  // other statements of the kernel may read the start as well
  const ownStart = text.hasColumn && !params.some((p) => p.name === "start") ? [{ name: "start", type: "int", arg: startOf(dim) }] : [];
  const beside = [...params, ...ownStart];
  const body = render("cuda/row_reduce.cu", {
    ...{ name: spec.name, op: stage.by === "sum" ? "Sum" : "Max", term: stage.term, lanes, threads, vector: shares.vector, unroll, width },
    ...{ rows: to.size, x: cudaType(x.dtype), out: cudaType(to.dtype), element: x.name, hasColumn: text.hasColumn },
    scalars: perRow.map((o) => ({ name: o.name, type: cudaType(o.dtype) })),
    ...{ beside: beside.map(({ name, type }) => ({ name, type })), after: [...statements] },
  });
  return {
    source: source(spec, body),
    launches: [
      {
        ...{ entry: spec.name, grid: [Math.ceil(to.size / (threads / lanes)), 1, 1], threads, shared: 0 },
        args: [x.name, ...perRow.map((o) => o.name), to.name, ...beside.map(({ name, arg = name }) => arg)],
      },
    ],
  };
}

/** A scalar to which the sum of a term over all elements, or over all rows, is added. */
function totalKernel(spec: KernelSpec, arch: Arch, layout: OperandLayout, total: Total): GeneratedKernel {
  const factor = total.divides ? 1 / total.by : total.by;
  const [to] = [...layout.access.keys()].slice(-1);
  invariant(to !== undefined, `${spec.op} has no output`);
  const plain = formulaText(cuda, { [to]: total });
  if (plain.stages.length) {
    const term = termOf(plain);
    return rowKernel(spec, layout, plain, {
      to,
      addend: `${f32(factor)} * ${term.strength < strength.mul ? `(${term.text})` : term.text}`,
    });
  }
  const reads = readsOf(spec, layout, plain);
  const [over, ...others] = reads("element");
  invariant(over !== undefined, `${spec.op} sums nothing`);
  const tables = reads("table");
  const indexed = [...others, ...tables];
  const text = formulaText(cuda, { [to]: total }, (name) => (name === over.name ? "x" : `${name}[j]`));
  const make = spec.tensors === undefined ? makeSum : makeSumList;
  return make(spec, arch, {
    ...{ over, to: operandOf(spec, to), factor, term: termOf(text).text, indexed },
    ...(tables[0] ? { width: tableIndex(tables[0].access, spec).width } : {}),
    row: indexed.map(({ name, access }) => {
      const offset = access.kind === "table" ? tableIndex(access, spec).offset : "i64(at) * N";
      return `const float* ${name} = ${name}At + ${offset};`;
    }),
  });
}
function termOf({ results }: FormulaText) {
  const [term] = results.values();
  invariant(term !== undefined, "a total has no term");
  return term;
}
