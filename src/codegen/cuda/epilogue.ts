/** Products whose results a formula reads: the text of the formula in Hopper's kernel, and the product and the formula apart on other architectures. */
import type { Arch } from "../../../schemas/devices.ts";
import { bytesOf, cudaType, float16Types, isFloat16 } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { type Access, layoutOf, operandsOf } from "../../ops/formula.ts";
import { invariant } from "../../ops/op.ts";
import { formulaText } from "../formulaText.ts";
import { type GeneratedKernel, type KernelSpec, operandOf } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, scratch, scratchStart } from "../launchArgs.ts";
import type { Epilogue, MatrixProduct } from "../matmul.ts";
import { formulaKernel } from "./formula.ts";
import { sumColumns, sumParts } from "./reduce.ts";
import { cuda } from "./text.ts";

/** Returns the names of the operands of an epilogue that have the elements of c: those that it reads beside c, and those that are stored. */
export function elementsOf({ c }: Pick<MatrixProduct, "c">, { formula, storesProduct }: Epilogue) {
  const { access } = layoutOf(formula);
  const names = (of: readonly { readonly name: string }[]) =>
    of.flatMap(({ name }) => (access.get(name)?.kind === "element" ? [name] : []));
  return {
    inputs: names(formula.inputs).filter((name) => name !== c.name),
    results: [...(storesProduct ? [c.name] : []), ...names(formula.outputs)],
  };
}

/** Declarations of an epilogue, and how the kernel receives its operands. */
export interface EpilogueText {
  readonly body: string;
  /** Operands whose boxes are loaded, and those that are stored, in the order of the tensor maps. */
  readonly inputs: readonly string[];
  readonly results: readonly string[];
  /** The parameters for the tensor maps, and those for pointers, with their arguments. */
  readonly maps: string;
  readonly pointers: readonly string[];
  readonly args: readonly KernelArg[];
  /** The members of `Operands` in order. */
  readonly operands: readonly string[];
  /** The output that is a sum along each row: a matrix of partial sums per column of tiles is in scratch. */
  readonly rowSum: string | undefined;
}

/** Returns the text of an epilogue of operands of one 16-bit type. */
export function epilogueText(spec: KernelSpec, p: MatrixProduct, epilogue: Epilogue): EpilogueText {
  const { formula, storesProduct } = epilogue;
  const layout = layoutOf(formula);
  const { c } = p;
  invariant(isFloat16(c.dtype), `${spec.op} stores ${c.dtype}`);
  const text = formulaText(cuda, formula.formula(operandsOf(layout), { ...spec.d, F: p.n }));
  const { stages } = text;
  const isPlain = text.once.length + text.row.length === 0 && stages.every(({ by, after }) => by === "sum" && after.length === 0);
  invariant(isPlain && !text.hasColumn && stages.length <= 1, `${spec.op} is more than a formula of elements and a sum of each row`);
  const named = (kind: Access["kind"], all: Iterable<string>) => [...all].filter((name) => layout.access.get(name)?.kind === kind);
  const { inputs, results } = elementsOf(p, epilogue);
  for (const name of [...inputs, ...results])
    invariant(name === c.name || operandOf(spec, name).dtype === c.dtype, `${name} is no ${c.dtype}`);
  const rowValues = named("row", text.reads).map((name) => ({ name, type: cudaType(operandOf(spec, name).dtype) }));
  const [rowSum, ...others] = named("row", text.results.keys());
  const [stage] = stages;
  invariant(
    others.length === 0 && (rowSum === undefined || text.results.get(rowSum)?.text === stage?.name),
    `${spec.op} has a value per row`,
  );
  const textOf = (name: string) => (storesProduct && name === c.name ? name : (text.results.get(name)?.text ?? ""));
  const body = render("cuda/gemm_epilogue.cuh", {
    ...{ columns: 128 / bytesOf[c.dtype], loadCount: inputs.length, perSet: Math.max(inputs.length, results.length) },
    ...{ inputs, rowValues, ragged: p.ragged === "rows", product: c.name, storesProduct, element: text.element },
    results: results.map((name) => ({ name, value: textOf(name) })),
    rowSums: rowSum !== undefined && stage ? [{ name: rowSum, term: stage.term }] : [],
    suffix: float16Types[c.dtype].suffix,
  });
  const tails = p.ragged === "rows" ? results : [];
  const mapNames = [...inputs.map((name) => `${name}Map`), ...results.map((name) => `${name}To`)];
  const pointers = [
    ...tails.map((name) => ({ name, type: "Out*", arg: name as KernelArg })),
    ...rowValues.map(({ name, type }) => ({ name, type: `const ${type}*`, arg: name as KernelArg })),
    ...(rowSum === undefined ? [] : [{ name: rowSum, type: "float*", arg: scratchStart as KernelArg }]),
  ];
  return {
    ...{ body, inputs, results, rowSum },
    maps: mapNames.map((name) => `const __grid_constant__ TensorMap ${name}`).join(", "),
    pointers: pointers.map(({ name, type }) => `${type} ${name}At`),
    args: pointers.map(({ arg }) => arg),
    operands: [...mapNames, ...pointers.map(({ name }) => `${name}At`)],
  };
}

/** Sums of more parts than this are added by a block for each column instead of by a thread. */
const MOST_PARTS = 16;

/** Returns the launch that adds the partial sums along each row, of `parts` columns of tiles; undefined for an epilogue without such an output. */
export function sumsOfRows(spec: KernelSpec, { rowSum }: EpilogueText, rows: number, parts: number) {
  if (rowSum === undefined) return undefined;
  const to = operandOf(spec, rowSum);
  const sum = rows % 4 === 0 && parts <= MOST_PARTS ? sumParts(spec, parts, rows, to) : sumColumns(spec, { rows: parts, width: rows, to });
  return { ...sum, scratch: parts * rows * bytesOf.f32 };
}

/** Returns the kernel of a product, made by `multiply`, and of the formula in a launch after it: a product that is no output is in scratch, in f32. */
export function applyAfter(
  spec: KernelSpec,
  { epilogue, ...rest }: MatrixProduct & { readonly epilogue: Epilogue },
  arch: Arch,
  multiply: (spec: KernelSpec, p: MatrixProduct) => GeneratedKernel,
): GeneratedKernel {
  const { formula, storesProduct } = epilogue;
  const c = storesProduct ? rest.c : ({ ...rest.c, dtype: "f32" } as const);
  const p = { ...rest, c };
  const [elements] = elementsOf(p, epilogue).inputs.map((name) => operandOf(spec, name));
  invariant(elements !== undefined, `${spec.op} reads a product alone`);
  const withProduct = {
    ...spec,
    size: { ...spec.size, [c.name]: elements.size },
    dtype: { ...spec.dtype, [c.name]: c.dtype },
    d: { ...spec.d, F: p.n },
  };
  const product = multiply({ ...withProduct, name: `${spec.name}_product` }, p);
  const result = formulaKernel(formula)({ ...withProduct, op: formula.name, name: `${spec.name}_formula` }, arch);
  const used = Math.ceil(Math.max(product.scratch ?? 0, result.scratch ?? 0) / 256) * 256;
  const moved = (launch: GeneratedLaunch): GeneratedLaunch =>
    storesProduct ? launch : { ...launch, args: launch.args.map((arg) => (arg === c.name ? scratch(used) : arg)) };
  return {
    source: `${product.source}\n${result.source}`,
    scratch: used + (storesProduct ? 0 : elements.size * bytesOf[c.dtype]),
    launches: [...product.launches, ...result.launches].map(moved),
  };
}
