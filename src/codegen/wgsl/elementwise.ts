/**
 * Elementwise kernels: an output element depends on the input elements at the same index, on values per row and on scalars. Values are loaded
 * as f32 and rounded when they are stored.
 */
import { render } from "../../../templates/bindings.ts";
import { attentionMerge } from "../../ops/attention.ts";
import { uniformMask } from "../../ops/capacity.ts";
import { dropout, dropsOf, jitter, runtimeAttrs } from "../../ops/dropout.ts";
import { addBiasRows } from "../../ops/gemm.ts";
import type { OperandName } from "../../ops/op.ts";
import { embed, softmaxTermsGrad } from "../../ops/vocab.ts";
import { type GeneratedKernel, type KernelOperand, type KernelSpec, operandOf, positionText, wgslKernel } from "../kernelSpec.ts";
import { rowIndex } from "../launchArgs.ts";
import { type Binding, bindingOf, type EntryPoint, float, foldGrid, kernel, scalar, vector, widthOf } from "./text.ts";

const THREADS = 256;

/** The expressions of an elementwise kernel, of type V: `width` elements per invocation, at vector `i`. */
export interface WgslElementwise {
  readonly width: 1 | 2 | 4;
  readonly inputs: readonly Input[];
  readonly functions?: readonly string[];
  /** Statements after the inputs are loaded. */
  readonly lines?: readonly string[];
  readonly outputs: readonly [Output, ...Output[]];
  /** Dims whose starts are in the components of `start`. */
  readonly starts?: readonly string[];
  /** Runtime attributes, in `start.attr`; starts are then in `start.start`. */
  readonly attrs?: readonly string[];
}
/** An input. Its buffer is `<name>_buf`; with an index, its element is loaded as `<name>`. */
export interface Input extends KernelOperand {
  /** Whether the buffer has vectors of `width` elements; else single elements. */
  readonly isVector: boolean;
  readonly index?: string;
}
interface Output extends KernelOperand {
  readonly value: string;
}

/** Returns an input with as many elements as the outputs. */
const stream = (o: KernelOperand): Input => ({ ...o, isVector: true, index: "i" });
/** Returns an input with one element for `elements` elements of the output. */
export const perRow = (o: KernelOperand, elements: number, width: number): Input => ({
  ...o,
  isVector: false,
  index: `i / ${elements / width}u`,
});
/** Returns an input that statements index. */
const indexed = (o: KernelOperand, isVector: boolean): Input => ({ ...o, isVector });

/** Returns the statements that load the inputs. */
export const loadsOf = (inputs: readonly Input[]): string[] =>
  inputs.flatMap(({ name, isVector, index }) =>
    index === undefined ? [] : [`let ${name} = ${isVector ? "V" : "f32"}(${name}_buf[${index}]);`],
  );
/** Returns the buffer of an input. */
export const bufferOf = (o: Input, width: number): Binding => bindingOf(o, o.isVector ? width : 1, `${o.name}_buf`);
/** Returns the statement that stores a vector. */
export const storeOf = ({ name, dtype, value }: Output, width: number, index = "i"): string =>
  `${name}_buf[${index}] = ${vector(scalar(dtype), width)}(${value});`;

/** Generates an elementwise kernel. If outputs are ragged, it computes only the rows that exist. */
export function makeElementwise(
  spec: KernelSpec,
  { width, inputs, functions = [], lines = [], outputs, starts = [], attrs = [] }: WgslElementwise,
): GeneratedKernel {
  const total = outputs[0].size;
  const written = outputs.filter((o) => !inputs.some((i) => i.name === o.name));
  const buffers = [...inputs, ...written.map(stream)].map((o) => bufferOf(o, width));
  if (spec.bound) buffers.push({ arg: rowIndex, type: "i32" });
  const groups = Math.ceil(total / width / THREADS);
  const entry: EntryPoint = { entry: spec.name, grid: groups, threads: THREADS, buffers, starts, attrs };
  const text = render("wgsl/map.wgsl", {
    ...{ op: spec.op, width, vector: vector("f32", width), functions: [...functions], threads: THREADS, entry: spec.name },
    index: foldGrid(groups).index,
    count: spec.bound ? `u32(rows[0]) * ${total / spec.bound / width}u` : `${total / width}u`,
    lines: [...loadsOf(inputs), ...lines, ...outputs.map((o) => storeOf(o, width))],
  });
  return kernel(spec, [entry], [text]);
}

/** Expressions with a random word per element of `x`, named `bits`. */
function atRandom(spec: KernelSpec<OperandName<typeof dropout>, "S" | "D" | "chunk" | "ranks">, value: string): WgslElementwise {
  const { S, D, chunk, ranks } = spec.d;
  const width = widthOf(D);
  const vectors = D / width;
  // a vector does not cross the four channels of a counter
  const bits = { 1: "words[c % 4u]", 2: "select(words.xy, words.zw, c % 4u == 2u)", 4: "words" }[width];
  return {
    ...{ width, inputs: [stream(operandOf(spec, "x")), indexed(operandOf(spec, "sample"), false)], starts: ["S"], attrs: runtimeAttrs },
    functions: [render("wgsl/philox.wgsl", {})],
    lines: [
      `let token = i / ${vectors}u;`,
      `let c = i % ${vectors}u * ${width}u;`,
      `let index = u32(start.start.x) + token % ${S}u;`,
      `let position = ${positionText("index", chunk, ranks)};`,
      `let words = philox(vec4<u32>(u32(sample_buf[token / ${S}u]), position, c / 4u, 0u), start.attr.xy);`,
      `let bits = ${bits};`,
    ],
    outputs: [{ ...operandOf(spec, "y"), value }],
  };
}

const MERGE_THREADS = 256;

/** WGSL kernels of dropout, sums and copies. */
export const elementwise = {
  add_bias_rows: wgslKernel(addBiasRows, (spec) => {
    const width = widthOf(spec.d.N);
    const vectors = spec.d.N / width;
    return makeElementwise(spec, {
      ...{ width, inputs: [stream(operandOf(spec, "x")), indexed(operandOf(spec, "bias"), true)], starts: ["E"] },
      lines: [`let own = u32(rows[3u + 3u * (i / ${vectors}u)] - start.x) * ${vectors}u + i % ${vectors}u;`],
      outputs: [{ ...operandOf(spec, "y"), value: "x + V(bias_buf[own])" }],
    });
  }),
  dropout: wgslKernel(dropout, (spec) => {
    const { threshold, factor } = dropsOf(spec.d.drop);
    const least = `${vector("u32", widthOf(spec.d.D))}(${threshold}u)`;
    return makeElementwise(spec, atRandom(spec, `select(x * ${float(factor)}, V(), bits < ${least})`));
  }),
  jitter: wgslKernel(jitter, (spec) => {
    const uniform = `V(bits >> ${vector("u32", widthOf(spec.d.D))}(8u)) * 0x1p-23 - 1.0`;
    return makeElementwise(spec, atRandom(spec, `x * (1.0 + ${float(spec.d.eps)} * (${uniform}))`));
  }),
  softmax_terms_grad: wgslKernel(softmaxTermsGrad, (spec) => {
    const { V, ids } = spec.d;
    const width = widthOf(V);
    const I = vector("i32", width);
    const lanes = width === 1 ? "0" : `${I}(${[0, 1, 2, 3].slice(0, width)})`;
    const ofIds = ids === undefined ? "ds * exp(x - m)" : `select(V(0.0), ds * exp(x - m), column < ${I}(${ids} - start.x))`;
    return makeElementwise(spec, {
      ...{ width, starts: ["V"] },
      inputs: [
        ...[stream(operandOf(spec, "x")), perRow(operandOf(spec, "m"), V, width), indexed(operandOf(spec, "target"), false)],
        ...[perRow(operandOf(spec, "ds"), V, width), perRow(operandOf(spec, "dp"), V, width)],
      ],
      lines: [`let chosen = target_buf[i / ${V / width}u] - start.x;`, `let column = ${I}(i32(i % ${V / width}u) * ${width}) + ${lanes};`],
      outputs: [{ ...operandOf(spec, "dx"), value: `${ofIds} + select(V(0.0), V(dp), column == ${I}(chosen))` }],
    });
  }),
  embed: wgslKernel(embed, (spec) => {
    const { V, D } = spec.d;
    const width = widthOf(D);
    const vectors = D / width;
    const table = operandOf(spec, "table");
    return makeElementwise(spec, {
      ...{ width, inputs: [indexed(operandOf(spec, "ids"), false), indexed(table, true)], starts: ["V"] },
      lines: [
        `let id = ids_buf[i / ${vectors}u] - start.x;`,
        `var row = ${vector(scalar(table.dtype), width)}();`,
        `if (id >= 0 && id < ${V}) {`,
        `  row = table_buf[u32(id) * ${vectors}u + i % ${vectors}u];`,
        "}",
      ],
      outputs: [{ ...operandOf(spec, "x"), value: "V(row)" }],
    });
  }),
  uniform_mask: wgslKernel(uniformMask, (spec) => {
    const { S, E, k, S0, E0, chunk, ranks } = spec.d;
    return makeElementwise(spec, {
      ...{ width: 1, inputs: [], starts: ["B", "S", "E"] },
      lines: [
        `let t = i / ${E}u;`,
        `let index = u32(start.y) + t % ${S}u;`,
        `let first = ((start.x + i32(t / ${S}u)) * ${S0} + i32(${positionText("index", chunk, ranks)})) % ${E0} * ${k} % ${E0};`,
        `let after = (start.z + i32(i % ${E}u) - first + ${E0}) % ${E0};`,
      ],
      outputs: [{ ...operandOf(spec, "c"), value: `select(0.0, 1.0, after < ${k})` }],
    });
  }),
  // log-sum-exps are bound as bits: WGSL has no number for that of a query without keys
  attention_merge: wgslKernel(attentionMerge, (spec) => {
    const { B, S, H, W } = spec.d;
    const width = widthOf(W);
    const count = (B * S * H * W) / width;
    const grid = Math.ceil(count / MERGE_THREADS);
    const bits = (arg: string): Binding => ({ arg, type: "u32" });
    const [a, b, o] = [operandOf(spec, "a"), operandOf(spec, "b"), operandOf(spec, "o")];
    const buffers = [bindingOf(a, width), bits("la"), bindingOf(b, width), bits("lb"), bindingOf(o, width), bits("lse")];
    const text = render("wgsl/attention_merge.wgsl", {
      ...{ entry: spec.name, threads: MERGE_THREADS, index: foldGrid(grid).index, count, width, vectors: W / width },
      ...{ vector: vector("f32", width), type: vector(scalar(o.dtype), width) },
    });
    return kernel(spec, [{ entry: spec.name, grid, threads: MERGE_THREADS, buffers }], [text]);
  }),
};
