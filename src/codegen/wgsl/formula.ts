/** WGSL kernels of ops with a formula: elementwise, per row (an invocation or several share a row), or a total in two launches. */
import { render } from "../../../templates/bindings.ts";
import { type Access, isTotal, layoutOf, type OperandLayout, operandsOf, productOf, type Result, type Total } from "../../ops/formula.ts";
import { type AnyFormulaOp, invariant } from "../../ops/op.ts";
import { type FormulaText, formulaText, type RowStage } from "../formulaText.ts";
import { type GeneratedKernel, type KernelSpec, operandOf, type WgslGenerator, wgslKernel } from "../kernelSpec.ts";
import { rowIndex } from "../launchArgs.ts";
import { bufferOf, type Input, loadsOf, makeElementwise, perRow, storeOf } from "./elementwise.ts";
import { scalarSum, THREADS, totalOver } from "./reduce.ts";
import { type Binding, definitionsFor, float, foldGrid, horizontal, kernel, lanesOf, vector, wgsl, widthOf } from "./text.ts";

/** Generates the kernel of an op from its formula. */
export const formulaKernel = (op: AnyFormulaOp): WgslGenerator => {
  const layout = layoutOf(op);
  return wgslKernel(op, (spec) => {
    const results = op.formula(operandsOf(layout), spec.d);
    const [first, ...others] = Object.values(results);
    if (first !== undefined && isTotal(first)) {
      invariant(others.length === 0, `${spec.op} has a total and another result`);
      return totalKernel(spec, layout, first);
    }
    const text = formulaText(wgsl, results);
    invariant(!text.hasColumn || text.stages.length > 0, `${spec.op} reads the index of a column outside of a reduction`);
    return text.stages.length ? rowKernel(spec, layout, text) : elementwiseKernel(spec, layout, text);
  });
};

/** The width of rows, if some operand is not the same for all elements and has not all of them. */
const rowWidthOf = (spec: KernelSpec, layout: OperandLayout, { reads }: Pick<FormulaText, "reads">): number | undefined => {
  for (const name of reads) {
    const access = layout.access.get(name);
    if (access?.kind === "row") return productOf(layout.rowDims, spec.d);
    if (access?.kind === "table") return productOf(access.width, spec.d);
  }
  return undefined;
};

/** The index of the vector of a table for the elements at vector `i`. */
function tableIndex(access: Extract<Access, { kind: "table" }>, spec: KernelSpec, width: number): string {
  const vectors = productOf(access.width, spec.d) / width;
  const within = `i % ${vectors}u`;
  return access.hasRows ? `i / ${productOf(access.batch, spec.d) / width}u * ${vectors}u + ${within}` : within;
}

/** The operands that a formula reads, in the order of the signature. `row` is the index of a row, if it is not derived from `i`. */
function inputsOf(spec: KernelSpec, layout: OperandLayout, { reads }: Pick<FormulaText, "reads">, width: number, row?: string): Input[] {
  return [...layout.access]
    .filter(([name]) => reads.has(name))
    .map(([name, access]): Input => {
      const o = operandOf(spec, name);
      switch (access.kind) {
        case "element":
          return { ...o, isVector: true, index: "i" };
        case "table":
          return { ...o, isVector: true, index: tableIndex(access, spec, width) };
        case "row":
          return row ? { ...o, isVector: false, index: row } : perRow(o, productOf(layout.rowDims, spec.d), width);
        case "launch":
          return { ...o, isVector: false, index: "0" };
        default:
          return access satisfies never;
      }
    });
}
const resultsOf = (spec: KernelSpec, layout: OperandLayout, { results }: FormulaText, kind: Access["kind"]) =>
  [...results]
    .filter(([name]) => layout.access.get(name)?.kind === kind)
    .map(([name, { text, isVector }]) => ({ ...operandOf(spec, name), value: kind === "row" || isVector ? text : `V(${text})` }));
const textsOf = ({ once, row, stages, element, results }: FormulaText): string[] => [
  ...[...once, ...row, ...element, ...stages.flatMap((s) => [s.term, ...s.after])],
  ...[...results.values()].map((r) => r.text),
];

function elementwiseKernel(spec: KernelSpec, layout: OperandLayout, text: FormulaText): GeneratedKernel {
  const [first, ...more] = resultsOf(spec, layout, text, "element");
  invariant(first !== undefined && 1 + more.length === text.results.size, `${spec.op} has results per row without a reduction`);
  const width = widthOf(rowWidthOf(spec, layout, text) ?? first.size / (spec.bound || 1));
  return makeElementwise(spec, {
    ...{ width, inputs: inputsOf(spec, layout, text, width), functions: definitionsFor(textsOf(text)) },
    lines: [...text.once, ...text.row, ...text.element],
    outputs: [first, ...more],
  });
}

/** The lowest f32, below any element. */
const LOWEST = "-0x1.fffffep+127";

/** The vectors of a row that one invocation reads. */
interface RowLoop {
  readonly from: string;
  readonly end: string;
  readonly lanes: number;
  readonly width: 1 | 2 | 4;
  /** Statements per vector `k`: its index `i`, and the elements. */
  readonly loadLines: readonly string[];
}
const loopOf = ({ from, end, lanes }: RowLoop): string => `for (var k = ${from}; k < ${end}; k += ${lanes}u) {`;

/** Returns the statements that reduce a row. */
function reduce({ name, by, term, after }: RowStage, element: readonly string[], row: RowLoop): string[] {
  const part = `${name}_part`;
  const parts = ["x", "y", "z", "w"].slice(0, row.width).map((c) => `${part}.${c}`);
  const own = by === "sum" || row.width === 1 ? horizontal(part, row.width) : parts.reduce((a, b) => `max(${a}, ${b})`);
  return [
    `var ${part} = V(${by === "sum" ? "0.0" : LOWEST});`,
    loopOf(row),
    ...[...row.loadLines, ...element].map((line) => `  ${line}`),
    `  ${part} = ${by === "sum" ? `${part} + ${term}` : `max(${part}, ${term})`};`,
    "}",
    `let ${name} = ${row.lanes > 1 ? `total(${own}, lane)` : own};`,
    ...after,
  ];
}

/** Divides the inputs into those that are loaded per vector and those that are loaded once. */
function loadsOfRow(spec: KernelSpec, layout: OperandLayout, text: FormulaText, width: number, row: string) {
  const inputs = inputsOf(spec, layout, text, width, row);
  const perVector = inputs.filter((o) => o.isVector);
  return {
    buffers: inputs.map((o) => bufferOf(o, width)),
    once: loadsOf(inputs.filter((o) => !o.isVector)),
    loadLines: ["let i = first + k;", ...loadsOf(perVector), ...(text.hasColumn ? [columnOf(width)] : [])],
  };
}

/** Returns the statement that declares the global indices of the elements of vector `k`. */
function columnOf(width: number): string {
  const lanes = width === 1 ? "0.0" : `V(${[0, 1, 2, 3].slice(0, width).map(float)})`;
  return `let column = V(f32(start.x + i32(k) * ${width})) + ${lanes};`;
}

/** What a kernel does for a row after its reductions. */
export interface WgslRowEnd {
  readonly buffers: readonly Binding[];
  readonly starts: readonly string[];
  readonly statements: readonly string[];
}

/**
 * Several invocations share a row that has values per row in memory, such as the channels of a token; an invocation has a row of its own
 * otherwise, such as the few scores of a token.
 */
export function rowKernel(
  spec: KernelSpec,
  layout: OperandLayout,
  text: FormulaText,
  end: WgslRowEnd = { buffers: [], starts: [], statements: [] },
): GeneratedKernel {
  const columns = productOf(layout.rowDims, spec.d);
  const width = widthOf(columns);
  const vectors = columns / width;
  const isShared = [...layout.access.values()].some((a) => a.kind === "row");
  const lanes = isShared ? lanesOf(vectors, THREADS) : 1;
  const [stage, ...stages] = text.stages;
  invariant(stage !== undefined && (lanes === 1 || stages.length === 0), `${spec.op} reduces nothing, or a shared row twice`);
  const rows = operandOf(spec, layout.full.name).size / columns;
  const groups = Math.ceil((rows * lanes) / THREADS);
  const { buffers, once, loadLines } = loadsOfRow(spec, layout, text, width, `min(row, ${rows - 1}u)`);
  const [outputs, rowOutputs] = [resultsOf(spec, layout, text, "element"), resultsOf(spec, layout, text, "row")];
  const loop: RowLoop = { from: `lane % ${lanes}u`, end: "end", lanes, width, loadLines };
  const body = render("wgsl/row_formula.wgsl", {
    ...{ op: spec.op, entry: spec.name, threads: THREADS, index: foldGrid(groups).index, lanes, perGroup: THREADS / lanes, vectors },
    ...{ width: columns, vector: vector("f32", width), functions: definitionsFor(textsOf(text)) },
    rows: spec.bound ? "u32(rows[0])" : `${rows}u`,
    lines: [...once, ...text.once, ...text.row, ...text.stages.flatMap((s) => reduce(s, text.element, loop))],
    stores: outputs.length ? [...loadLines, ...text.element, ...outputs.map((o) => storeOf(o, width))] : [],
    rowStores: [...rowOutputs.map((o) => storeOf(o, 1, "row")), ...end.statements],
  });
  const written = [
    ...outputs.map((o) => bufferOf({ ...o, isVector: true }, width)),
    ...rowOutputs.map((o) => bufferOf({ ...o, isVector: false }, 1)),
  ];
  const all = [...buffers, ...written, ...end.buffers, ...(spec.bound ? [{ arg: rowIndex, type: "i32" }] : [])];
  const total = lanes > 1 ? [totalOver(lanes, stage.by === "max" ? { combine: "max(a, b)" } : {})] : [];
  const dim = layout.rowDims.at(-1);
  const starts = text.hasColumn && dim !== undefined && !end.starts.length ? [dim] : end.starts;
  return kernel(spec, [{ entry: spec.name, grid: groups, threads: THREADS, buffers: all, starts }], [...total, body]);
}

/** A scalar to which the sum of a term over all elements, or over all rows, is added. */
function totalKernel(spec: KernelSpec, layout: OperandLayout, { term, by, divides }: Total): GeneratedKernel {
  const results: Record<string, Result> = { term };
  const text = formulaText(wgsl, results);
  const factor = float(divides ? 1 / by : by);
  const value = text.results.get("term");
  invariant(value !== undefined, `${spec.op} has no term`);
  const full = operandOf(spec, layout.full.name);
  const functions = (width: number) => [`alias V = ${vector("f32", width)};`, ...definitionsFor(textsOf(text))];
  if (text.stages.length) {
    const columns = productOf(layout.rowDims, spec.d);
    const width = widthOf(columns);
    const { buffers, once, loadLines } = loadsOfRow(spec, layout, text, width, "row");
    const loop: RowLoop = { from: "0u", end: `${columns / width}u`, lanes: 1, width, loadLines };
    const reduced = text.stages.flatMap((s) => reduce(s, text.element, loop));
    return scalarSum(spec, {
      ...{ buffers, count: full.size / columns, functions: functions(width), term: value.text, factor },
      lines: [`let row = i;`, `let first = row * ${columns / width}u;`, ...once, ...text.once, ...text.row, ...reduced],
    });
  }
  const width = widthOf(rowWidthOf(spec, layout, text) ?? full.size);
  const inputs = inputsOf(spec, layout, text, width);
  return scalarSum(spec, {
    ...{ buffers: inputs.map((o) => bufferOf(o, width)), count: full.size / width, functions: functions(width), factor },
    lines: [
      ...loadsOf(inputs),
      ...text.once,
      ...text.row,
      ...text.element,
      `let addend = ${value.isVector ? value.text : `V(${value.text})`};`,
    ],
    term: horizontal("addend", width),
  });
}
