/**
 * Ops whose every element of the output comes from the same elements of the inputs, from a number per row, or from a scalar:
 * one template, and per op its formula. A formula speaks of values that are loaded as f32 and rounded when stored.
 */
import { render } from "../../../templates/bindings.ts";
import { dropsOf, told } from "../../ops/dropout.ts";
import { ops } from "../../ops/index.ts";
import { type Made, positionText, type Use } from "../kernelSpec.ts";
import { type Binding, type Entry, float, fold, kernel, scalar, vector, widthOf } from "./text.ts";

const THREADS = 256;

export interface Formula {
  /**
   * Where inputs are found that are neither of the output's size nor scalars. A number: elements of the output that share one
   * of its own. `vector` and `element`: the source indexes the buffer `<name>_buf` itself.
   */
  readonly at?: Readonly<Record<string, number | "vector" | "element">>;
  /** Inputs, and outputs that are updated, of which this reads; all inputs if not said. */
  readonly reads?: readonly string[];
  readonly functions?: readonly string[];
  readonly lines?: readonly string[];
  /** The value of each output, of type V. An output that is kept is added to, unless it is among what is read. */
  readonly results: Readonly<Record<string, string>>;
  /** Elements that one invocation computes. */
  readonly width: 1 | 2 | 4;
  readonly starts?: readonly string[];
  /** Attributes that it is told, in `start.attr`; starts are then in `start.start`. */
  readonly attrs?: readonly string[];
}

/** The kernel of a formula. Of ragged outputs it computes the rows that exist. */
export function map(use: Use, { at = {}, reads, functions = [], lines = [], results, width, starts = [], attrs = [] }: Formula): Made {
  const { inputs } = ops[use.op]!;
  const outputs = Object.keys(results);
  const total = Math.max(...outputs.map((o) => use.size[o]!));
  const inner = reads ?? inputs.map((o) => o.name);
  const wide = (name: string): boolean => at[name] === "vector" || (at[name] === undefined && use.size[name] === total);
  const typeOf = (name: string): string => (wide(name) ? vector(scalar(use.dtype[name]!), width) : scalar(use.dtype[name]!));
  const V = vector("f32", width);

  const names = [...inner, ...outputs.filter((o) => !inner.includes(o))];
  const buffers: Binding[] = names.map((name) => ({ arg: name, name: `${name}_buf`, type: typeOf(name) }));
  if (use.bound) buffers.push({ arg: "rows", type: "i32" });
  const load = (name: string): string[] => {
    const where = at[name];
    if (where === "vector" || where === "element") return [];
    if (typeof where === "number") return [`let ${name} = f32(${name}_buf[i / ${where / width}u]);`];
    return wide(name) ? [`let ${name} = V(${name}_buf[i]);`] : [`let ${name} = f32(${name}_buf[0]);`];
  };
  const store = (name: string): string => {
    const value = use.keeps.has(name) && !inner.includes(name) ? `V(${name}_buf[i]) + (${results[name]})` : results[name]!;
    return `${name}_buf[i] = ${typeOf(name)}(${value});`;
  };
  const body = [...inner.flatMap(load), ...lines, ...outputs.map(store)];
  const entry: Entry = { entry: use.name, grid: Math.ceil(total / width / THREADS), threads: THREADS, buffers, starts, attrs };
  const text = render("wgsl/map.wgsl", {
    op: use.op,
    width,
    vector: V,
    functions: [...functions],
    threads: THREADS,
    entry: use.name,
    index: fold(Math.ceil(total / width / THREADS)).index,
    count: use.bound ? `u32(rows[0]) * ${total / use.bound / width}u` : `${total / width}u`,
    lines: body,
  });
  return kernel(use, [entry], [text]);
}

/** e^80 is finite, and what is below -80 counts for nothing. */
export const sigmoid = "fn sigmoid(x: V) -> V { return V(1.0) / (V(1.0) + exp(min(-x, V(80.0)))); }";

/** log(1 + z) for z from 0 to 1; near 0 the digits that 1 + z would lose, by the series, whose first term left out is z^5/5 ≈ 1e-8 of z. */
const log1p = "fn log1p(z: V) -> V { return select(log(1.0 + z), z * (1.0 - z * (0.5 - z * (V(0.33333333) - z * 0.25))), z < V(0.02)); }";

/** The width for an op on whole operands: of ragged ones a row is a multiple of it. */
const plain = (use: Use, name: string): 1 | 2 | 4 => widthOf(use.size[name]! / (use.bound || 1));

/** With counts for every `batch` elements of dp. */
function auxLossGrad({ d, size }: Use, batch: number): Formula {
  const width = widthOf(d.E!);
  const [experts, vectors] = [d.E! / width, batch / width];
  return {
    width,
    reads: ["n", "dy"],
    at: { n: "vector", dy: size.dp! },
    results: { dp: `${float(d.c!)} * dy * V(n_buf[i / ${vectors}u * ${experts}u + i % ${experts}u])` },
  };
}

/** Of each element of `x`, a word of its own: `bits`. */
function atRandom({ d }: Use, y: string): Formula {
  const { S, D, chunk, ranks } = d as Readonly<Record<"S" | "D" | "chunk" | "ranks", number>>;
  const width = widthOf(D);
  const wide = D / width;
  // a vector lies within the four channels of a counter
  const bits = { 1: "words[c % 4u]", 2: "select(words.xy, words.zw, c % 4u == 2u)", 4: "words" }[width];
  return {
    ...{ width, at: { sample: "element" }, starts: ["S"], attrs: told, results: { y } },
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

const silu = { dgate: "up * s * (1.0 + gate * (1.0 - s))", dup: "gate * s" };

const formulas: Readonly<Record<string, (use: Use) => Formula>> = {
  add: (use) => ({ width: plain(use, "y"), results: { y: "a + b" } }),
  accumulate: (use) => ({ width: plain(use, "y"), results: { y: "x" } }),
  add_bias({ d }) {
    const width = widthOf(d.N!);
    const wide = d.N! / width;
    return { width, at: { bias: "vector" }, results: { y: `x + V(bias_buf[i % ${wide}u])` } };
  },
  cast: (use) => ({ width: plain(use, "y"), results: { y: "x" } }),

  swiglu: (use) => ({ functions: [sigmoid], width: plain(use, "y"), results: { y: "gate * sigmoid(gate) * up" } }),
  swiglu_grad: (use) => ({
    functions: [sigmoid],
    width: plain(use, "dy"),
    lines: ["let s = sigmoid(gate);"],
    results: { dgate: `dy * ${silu.dgate}`, dup: `dy * ${silu.dup}` },
  }),
  gated: ({ d }) => ({
    ...{ functions: [sigmoid], width: widthOf(d.C!), at: { gate: d.C! } },
    results: { y: "x * sigmoid(V(gate))" },
  }),
  swiglu_rows: (use) => ({
    functions: [sigmoid],
    width: widthOf(use.d.F!),
    at: { p: use.d.F! },
    results: { y: "gate * sigmoid(gate) * up * p" },
  }),

  sigmoid: (use) => ({ functions: [sigmoid], width: plain(use, "y"), results: { y: "sigmoid(x)" } }),
  sigmoid_grad: (use) => ({ width: plain(use, "dx"), results: { dx: "dy * y * (V(1.0) - y)" } }),
  sqrt_softplus: (use) => ({ functions: [log1p], width: plain(use, "y"), results: { y: "sqrt(max(x, V(0.0)) + log1p(exp(-abs(x))))" } }),
  sqrt_softplus_grad: (use) => ({
    ...{ functions: [sigmoid], width: plain(use, "dx") },
    results: { dx: "select(V(0.0), dy * sigmoid(x) / (2.0 * y), y > V(0.0))" },
  }),

  nll: (use) => ({ width: plain(use, "l"), results: { l: "log(s) + m - p" } }),
  nll_grad: (use) => ({ width: plain(use, "ds"), results: { ds: "dy / s", dp: "-dy" } }),
  mean_grad: (use) => ({
    width: plain(use, "dl"),
    reads: ["dy"],
    at: { dy: use.size.dl! },
    results: { dl: `V(dy / ${float(use.d.count!)})` },
  }),
  weighted_sum_grad: (use) => ({ width: plain(use, "dl"), at: { dy: use.size.dl! }, results: { dl: "weight * V(dy)" } }),
  sum_exp_grad: ({ d }) => ({ width: widthOf(d.V!), at: { m: d.V!, dy: d.V! }, results: { dx: "dy * exp(x - m)" } }),
  pick_grad({ d }) {
    const width = widthOf(d.V!);
    const I = vector("i32", width);
    const lanes = width === 1 ? "0" : `${I}(${[0, 1, 2, 3].slice(0, width)})`;
    return {
      width,
      reads: ["target", "dy"],
      at: { target: "element", dy: d.V! },
      starts: ["V"],
      lines: [
        `let chosen = target_buf[i / ${d.V! / width}u] - start.x;`,
        `let column = ${I}(i32(i % ${d.V! / width}u) * ${width}) + ${lanes};`,
      ],
      results: { dx: `select(V(0.0), V(dy), column == ${I}(chosen))` },
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
  choose_evenly: ({ d }) => {
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
  dropout(use) {
    const { threshold, factor } = dropsOf(use.d.drop!);
    const none = `${vector("u32", widthOf(use.d.D!))}(${threshold}u)`;
    return atRandom(use, `select(x * ${float(factor)}, V(), bits < ${none})`);
  },
  jitter: (use) => atRandom(use, `x * (1.0 + ${float(use.d.eps!)} * (V(bits >> ${vector("u32", widthOf(use.d.D!))}(8u)) * 0x1p-23 - 1.0))`),
  aux_loss_grad: (use) => auxLossGrad(use, use.d.P! * use.d.S! * use.d.E!),
  global_aux_loss_grad: (use) => auxLossGrad(use, use.size.dp!),
};

export const elementwise = Object.fromEntries(
  Object.entries(formulas).map(([op, formula]) => [op, (use: Use): Made => map(use, formula(use))]),
);
