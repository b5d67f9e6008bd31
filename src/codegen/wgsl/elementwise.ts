/**
 * Elementwise kernels: an output element depends on the input elements at the same index, on values per row and on scalars. One template
 * serves all ops; each op has a formula on values that are loaded as f32 and rounded when stored.
 */
import { render } from "../../../templates/bindings.ts";
import { dropsOf, runtimeAttrs } from "../../ops/dropout.ts";
import { ops } from "../../ops/index.ts";
import { gatedUnitText, perGatedUnit } from "../gatedUnitText.ts";
import { type GeneratedKernel, type KernelSpec, positionText } from "../kernelSpec.ts";
import { type Binding, type EntryPoint, float, foldGrid, kernel, scalar, vector, widthOf } from "./text.ts";

const THREADS = 256;

export interface WgslFormula {
  /**
   * Access to inputs that have neither the size of the output nor one element. A number: output elements per input element.
   * `vector` and `element`: the formula indexes the buffer `<name>_buf`.
   */
  readonly at?: Readonly<Record<string, number | "vector" | "element">>;
  /** Inputs and updated outputs that the formula reads; default: all inputs. */
  readonly reads?: readonly string[];
  readonly functions?: readonly string[];
  readonly lines?: readonly string[];
  /** The value of each output, of type V. It is added to an accumulating output, unless `reads` contains the output. */
  readonly results: Readonly<Record<string, string>>;
  /** Elements per invocation. */
  readonly width: 1 | 2 | 4;
  readonly starts?: readonly string[];
  /** Runtime attributes, in `start.attr`; starts are then in `start.start`. */
  readonly attrs?: readonly string[];
}

/** Generates the kernel of a formula. For ragged outputs it computes only the rows that exist. */
export function map(
  spec: KernelSpec,
  { at = {}, reads, functions = [], lines = [], results, width, starts = [], attrs = [] }: WgslFormula,
): GeneratedKernel {
  const { inputs } = ops[spec.op];
  const outputs = Object.keys(results);
  const total = Math.max(...outputs.map((o) => spec.size[o]!));
  const inner = reads ?? inputs.map((o) => o.name);
  const wide = (name: string): boolean => at[name] === "vector" || (at[name] === undefined && spec.size[name] === total);
  const typeOf = (name: string): string => (wide(name) ? vector(scalar(spec.dtype[name]!), width) : scalar(spec.dtype[name]!));
  const V = vector("f32", width);

  const names = [...inner, ...outputs.filter((o) => !inner.includes(o))];
  const buffers: Binding[] = names.map((name) => ({ arg: name, name: `${name}_buf`, type: typeOf(name) }));
  if (spec.bound) buffers.push({ arg: "rows", type: "i32" });
  const load = (name: string): string[] => {
    const where = at[name];
    if (where === "vector" || where === "element") return [];
    if (typeof where === "number") return [`let ${name} = f32(${name}_buf[i / ${where / width}u]);`];
    return wide(name) ? [`let ${name} = V(${name}_buf[i]);`] : [`let ${name} = f32(${name}_buf[0]);`];
  };
  const store = (name: string): string => {
    const value = spec.accumulates.has(name) && !inner.includes(name) ? `V(${name}_buf[i]) + (${results[name]})` : results[name]!;
    return `${name}_buf[i] = ${typeOf(name)}(${value});`;
  };
  const body = [...inner.flatMap(load), ...lines, ...outputs.map(store)];
  const entry: EntryPoint = { entry: spec.name, grid: Math.ceil(total / width / THREADS), threads: THREADS, buffers, starts, attrs };
  const text = render("wgsl/map.wgsl", {
    op: spec.op,
    width,
    vector: V,
    functions: [...functions],
    threads: THREADS,
    entry: spec.name,
    index: foldGrid(Math.ceil(total / width / THREADS)).index,
    count: spec.bound ? `u32(rows[0]) * ${total / spec.bound / width}u` : `${total / width}u`,
    lines: body,
  });
  return kernel(spec, [entry], [text]);
}

/** The argument is clamped because e^80 is finite; sigmoid(-80) is about 2e-35. */
export const sigmoid = "fn sigmoid(x: V) -> V { return V(1.0) / (V(1.0) + exp(min(-x, V(80.0)))); }";

/** log(1 + z) for z in [0, 1]. Near 0, where 1 + z loses digits, a series; its first omitted term is z^5/5, about 1e-8 of z. */
const log1p = "fn log1p(z: V) -> V { return select(log(1.0 + z), z * (1.0 - z * (0.5 - z * (V(0.33333333) - z * 0.25))), z < V(0.02)); }";

/** Returns the vector width of an op without rows; for ragged operands it divides the row. */
const plain = (spec: KernelSpec, name: string): 1 | 2 | 4 => widthOf(spec.size[name]! / (spec.bound || 1));

/** Formula with one count vector per `batch` elements of dp. */
function auxLossGrad({ d, size }: KernelSpec, batch: number): WgslFormula {
  const width = widthOf(d.E!);
  const [experts, vectors] = [d.E! / width, batch / width];
  return {
    width,
    reads: ["n", "dy"],
    at: { n: "vector", dy: size.dp! },
    results: { dp: `${float(d.c!)} * dy * V(n_buf[i / ${vectors}u * ${experts}u + i % ${experts}u])` },
  };
}

/** Formula with a random word per element of `x`, named `bits`. */
function atRandom({ d }: KernelSpec, y: string): WgslFormula {
  const { S, D, chunk, ranks } = d as Readonly<Record<"S" | "D" | "chunk" | "ranks", number>>;
  const width = widthOf(D);
  const wide = D / width;
  // a vector does not cross the four channels of a counter
  const bits = { 1: "words[c % 4u]", 2: "select(words.xy, words.zw, c % 4u == 2u)", 4: "words" }[width];
  return {
    ...{ width, at: { sample: "element" }, starts: ["S"], attrs: runtimeAttrs, results: { y } },
    functions: [render("wgsl/philox.wgsl", {})],
    lines: [
      `let token = i / ${wide}u;`,
      `let c = i % ${wide}u * ${width}u;`,
      `let index = u32(start.start.x) + token % ${S}u;`,
      `let position = ${positionText("index", chunk, ranks)};`,
      `let words = philox(vec4<u32>(u32(sample_buf[token / ${S}u]), position, c / 4u, 0u), start.attr.xy);`,
      `let bits = ${bits};`,
    ],
  };
}

const formulas: Readonly<Record<string, (spec: KernelSpec) => WgslFormula>> = {
  add: (spec) => ({ width: plain(spec, "y"), results: { y: "a + b" } }),
  accumulate: (spec) => ({ width: plain(spec, "y"), results: { y: "x" } }),
  add_bias({ d }) {
    const width = widthOf(d.N!);
    const wide = d.N! / width;
    return { width, at: { bias: "vector" }, results: { y: `x + V(bias_buf[i % ${wide}u])` } };
  },
  cast: (spec) => ({ width: plain(spec, "y"), results: { y: "x" } }),

  ...perGatedUnit("dense", (unit) => (spec: KernelSpec) => ({
    ...{ functions: [sigmoid], width: plain(spec, "y") },
    results: { y: `gate * sigmoid(${gatedUnitText(unit, "gate", float).argument}) * up` },
  })),
  ...perGatedUnit("denseGrad", (unit) => (spec: KernelSpec) => {
    const { argument, slope } = gatedUnitText(unit, "gate", float);
    return {
      ...{ functions: [sigmoid], width: plain(spec, "dy") },
      lines: [`let s = sigmoid(${argument});`],
      results: { dgate: `dy * up * ${slope}`, dup: "dy * gate * s" },
    };
  }),
  ...perGatedUnit("rows", (unit) => ({ d }: KernelSpec) => ({
    ...{ functions: [sigmoid], width: widthOf(d.F!), at: { p: d.F! } },
    results: { y: `gate * sigmoid(${gatedUnitText(unit, "gate", float).argument}) * up * p` },
  })),
  sigmoid_gate: ({ d }) => ({
    ...{ functions: [sigmoid], width: widthOf(d.C!), at: { gate: d.C! } },
    results: { y: "x * sigmoid(V(gate))" },
  }),

  sigmoid: (spec) => ({ functions: [sigmoid], width: plain(spec, "y"), results: { y: "sigmoid(x)" } }),
  sigmoid_grad: (spec) => ({ width: plain(spec, "dx"), results: { dx: "dy * y * (V(1.0) - y)" } }),
  sqrt_softplus: (spec) => ({ functions: [log1p], width: plain(spec, "y"), results: { y: "sqrt(max(x, V(0.0)) + log1p(exp(-abs(x))))" } }),
  sqrt_softplus_grad: (spec) => ({
    ...{ functions: [sigmoid], width: plain(spec, "dx") },
    results: { dx: "select(V(0.0), dy * sigmoid(x) / (2.0 * y), y > V(0.0))" },
  }),

  nll: (spec) => ({ width: plain(spec, "l"), results: { l: "log(s) + m - p" } }),
  nll_grad: (spec) => ({ width: plain(spec, "ds"), results: { ds: "dy / s", dp: "-dy" } }),
  mean_grad: (spec) => ({
    width: plain(spec, "dl"),
    reads: ["dy"],
    at: { dy: spec.size.dl! },
    results: { dl: `V(dy / ${float(spec.d.count!)})` },
  }),
  weighted_sum_grad: (spec) => ({ width: plain(spec, "dl"), at: { dy: spec.size.dl! }, results: { dl: "weight * V(dy)" } }),
  softmax_terms_grad({ d }) {
    const width = widthOf(d.V!);
    const I = vector("i32", width);
    const lanes = width === 1 ? "0" : `${I}(${[0, 1, 2, 3].slice(0, width)})`;
    return {
      width,
      at: { m: d.V!, target: "element", ds: d.V!, dp: d.V! },
      starts: ["V"],
      lines: [
        `let chosen = target_buf[i / ${d.V! / width}u] - start.x;`,
        `let column = ${I}(i32(i % ${d.V! / width}u) * ${width}) + ${lanes};`,
      ],
      results: { dx: `ds * exp(x - m) + select(V(0.0), V(dp), column == ${I}(chosen))` },
    };
  },
  embed({ d, dtype }) {
    const width = widthOf(d.D!);
    const wide = d.D! / width;
    return {
      width,
      at: { ids: "element", table: "vector" },
      starts: ["V"],
      lines: [
        `let id = ids_buf[i / ${wide}u] - start.x;`,
        `var row = ${vector(scalar(dtype.table!), width)}();`,
        `if (id >= 0 && id < ${d.V}) {`,
        `  row = table_buf[u32(id) * ${wide}u + i % ${wide}u];`,
        "}",
      ],
      results: { x: "V(row)" },
    };
  },
  uniform_mask: ({ d }) => {
    const { S, E, k, S0, E0, chunk, ranks } = d as Readonly<Record<"S" | "E" | "k" | "S0" | "E0" | "chunk" | "ranks", number>>;
    return {
      ...{ width: 1, reads: [], starts: ["B", "S", "E"] },
      lines: [
        `let t = i / ${E}u;`,
        `let index = u32(start.y) + t % ${S}u;`,
        `let first = ((start.x + i32(t / ${S}u)) * ${S0} + i32(${positionText("index", chunk, ranks)})) % ${E0} * ${k} % ${E0};`,
        `let after = (start.z + i32(i % ${E}u) - first + ${E0}) % ${E0};`,
      ],
      results: { c: `select(0.0, 1.0, after < ${k})` },
    };
  },
  dropout(spec) {
    const { threshold, factor } = dropsOf(spec.d.drop!);
    const none = `${vector("u32", widthOf(spec.d.D!))}(${threshold}u)`;
    return atRandom(spec, `select(x * ${float(factor)}, V(), bits < ${none})`);
  },
  jitter: (spec) =>
    atRandom(spec, `x * (1.0 + ${float(spec.d.eps!)} * (V(bits >> ${vector("u32", widthOf(spec.d.D!))}(8u)) * 0x1p-23 - 1.0))`),
  aux_loss_grad: (spec) => auxLossGrad(spec, spec.d.P! * spec.d.S! * spec.d.E!),
  global_aux_loss_grad: (spec) => auxLossGrad(spec, spec.size.dp!),
};

export const elementwise = Object.fromEntries(
  Object.entries(formulas).map(([op, formula]) => [op, (spec: KernelSpec): GeneratedKernel => map(spec, formula(spec))]),
);
