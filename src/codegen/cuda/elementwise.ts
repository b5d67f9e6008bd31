/** Elementwise kernels: an output element depends on the input elements at the same index, on values per row and on scalars. */

import { cudaArchs } from "../../../schemas/devices.ts";
import { cudaType } from "../../../schemas/dtypes.ts";
import type { Dtype } from "../../../schemas/plan.ts";
import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import { dropsOf, runtimeAttrs } from "../../ops/dropout.ts";
import { gatedUnitText, perGatedUnit } from "../gatedUnitText.ts";
import { type CudaGenerator, type GeneratedKernel, type KernelSpec, positionText } from "../kernelSpec.ts";
import { attributeOf, startOf } from "../launchArgs.ts";
import type { Arch } from "../targetNames.ts";
import { source } from "./prelude.ts";

export { cudaType };

/** The formula of an elementwise kernel. In expressions the name of an operand is its element, `row` the row index, and `<name>At` the pointer of an indexed operand. */
export interface CudaFormula {
  /** Inputs with as many elements as the outputs. */
  readonly streams: readonly string[];
  /** Inputs with a single element. */
  readonly scalars?: readonly string[];
  /** Inputs that the statements in `row` or `element` index. */
  readonly indexed?: readonly string[];
  /** Elements per row; a vector does not cross the end of a row. */
  readonly width?: number;
  /** Outputs with one element per row, written by the statements in `row` at the start of a row. */
  readonly numbers?: readonly string[];
  /** By input, the statement that loads a vector into `<name>In[k]`; `at` is the index of the output vector. */
  readonly gathers?: Readonly<Record<string, string>>;
  readonly once?: readonly string[];
  readonly row?: readonly string[];
  readonly element?: readonly string[];
  readonly outputs: Readonly<Record<string, string>>;
  /** Declarations before the kernel. */
  readonly functions?: readonly string[];
  /** Runtime attributes, passed as u32. */
  readonly attrs?: readonly string[];
}

type Sizes = Readonly<Record<string, number>>;
const formulas: Readonly<Record<string, (d: Sizes, starts: string) => CudaFormula>> = {
  add: () => ({ streams: ["a", "b"], outputs: { y: "a + b" } }),
  accumulate: () => ({ streams: ["x", "y"], outputs: { y: "y + x" } }),
  add_bias: ({ N }) => ({
    ...{ streams: ["x"], width: N! },
    gathers: { bias: `biasIn[k] = biasIn[k].load(biasAt + int(at % (${N} / N)) * N);` },
    outputs: { y: "x + bias" },
  }),
  cast: () => ({ streams: ["x"], outputs: { y: "x" } }),
  ...perGatedUnit("dense", (unit) => () => ({
    ...{ streams: ["gate", "up"] },
    outputs: { y: `gate * sigmoid(${gatedUnitText(unit, "gate", f32).argument}) * up` },
  })),
  ...perGatedUnit("denseGrad", (unit) => () => {
    const { argument, slope } = gatedUnitText(unit, "gate", f32);
    return {
      streams: ["gate", "up", "dy"],
      element: [`const float s = sigmoid(${argument});`],
      outputs: { dgate: `dy * up * ${slope}`, dup: "dy * gate * s" },
    };
  }),
  ...perGatedUnit("rows", (unit) => ({ F }: Sizes) => ({
    ...{ streams: ["gate", "up"], indexed: ["p"], width: F! },
    row: ["const float p = widen(pAt[row]);"],
    outputs: { y: `gate * sigmoid(${gatedUnitText(unit, "gate", f32).argument}) * up * p` },
  })),
  sigmoid_gate: ({ C }) => ({
    ...{ streams: ["x"], indexed: ["gate"], width: C! },
    row: ["const float share = sigmoid(widen(gateAt[row]));"],
    outputs: { y: "x * share" },
  }),
  sigmoid: () => ({ streams: ["x"], outputs: { y: "sigmoid(x)" } }),
  sigmoid_grad: () => ({ streams: ["y", "dy"], outputs: { dx: "dy * y * (1.0f - y)" } }),
  sqrt_softplus: () => ({ streams: ["x"], outputs: { y: "sqrtf(fmaxf(x, 0.0f) + log1pf(fastExp(-fabsf(x))))" } }),
  sqrt_softplus_grad: () => ({ streams: ["x", "y", "dy"], outputs: { dx: "y > 0.0f ? dy * sigmoid(x) / (2.0f * y) : 0.0f" } }),
  nll: () => ({ streams: ["m", "s", "p"], outputs: { l: "logf(s) + m - p" } }),
  nll_grad: () => ({ streams: ["s", "dy"], outputs: { ds: "dy / s", dp: "-dy" } }),
  mean_grad: ({ count }) => ({ streams: [], scalars: ["dy"], outputs: { dl: `dy * ${f32(1 / count!)}` } }),
  weighted_sum_grad: () => ({ streams: ["weight"], scalars: ["dy"], outputs: { dl: "weight * dy" } }),
  softmax_terms_grad: ({ V }, start) => ({
    ...{ streams: ["x"], indexed: ["m", "target", "ds", "dp"], width: V! },
    row: [
      "const float m = widen(mAt[row]), ds = widen(dsAt[row]), dp = widen(dpAt[row]);",
      // an id of another shard is below 0 or at least V, so it matches no element
      `const int here = targetAt[row] - ${start} - int(at % (${V} / N)) * N;`,
    ],
    outputs: { dx: "ds * fastExp(x - m) + (j == here ? dp : 0.0f)" },
  }),
  embed: ({ V, D }, start) => ({
    ...{ streams: [], indexed: ["ids"], width: D! },
    gathers: {
      table: [
        `const int id = idsAt[at / (${D} / N)] - ${start};`,
        "tableIn[k] = {};",
        `if (id >= 0 && id < ${V}) tableIn[k] = tableIn[k].load(tableAt + i64(id) * ${D} + at % (${D} / N) * N);`,
      ].join(" "),
    },
    outputs: { x: "table" },
  }),
  aux_loss_grad: ({ P, S, E, c }) => ({
    ...{ streams: [], scalars: ["dy"], indexed: ["n"], width: E! },
    row: [`const float* n = nAt + i64(row / ${P! * S!}) * ${E} + int(at % (${E} / N)) * N;`],
    outputs: { dp: `${f32(c!)} * dy * n[j]` },
  }),
  global_aux_loss_grad: ({ E, c }) => ({
    ...{ streams: [], scalars: ["dy"], indexed: ["n"], width: E! },
    row: [`const float* n = nAt + int(at % (${E} / N)) * N;`],
    outputs: { dp: `${f32(c!)} * dy * n[j]` },
  }),
  dropout(d, start) {
    const { threshold, factor } = dropsOf(d.drop!);
    return atRandom(d, start, `word < ${threshold}u ? 0.0f : x * ${f32(factor)}`);
  },
  jitter: (d, start) => atRandom(d, start, `x * (1.0f + ${f32(d.eps!)} * (float(word >> 8) * 0x1p-23f - 1.0f))`),
  // a shard without visible keys has lse = −∞; the difference of two −∞ is avoided
  attention_merge: ({ W }) => ({
    ...{ streams: ["a", "b"], indexed: ["la", "lb"], numbers: ["lse"], width: W! },
    row: [
      "const float la = laAt[row], lb = lbAt[row], most = fmaxf(la, lb), from = most == Max::none ? 0.0f : most;",
      "const float wa = fastExp(la - from), wb = fastExp(lb - from), sum = wa + wb, by = sum > 0.0f ? 1.0f / sum : 0.0f;",
      `if (at % (${W} / N) == 0) lseAt[row] = from + logf(sum);`,
    ],
    outputs: { o: "(wa * a + wb * b) * by" },
  }),
};
/** The dim whose start an op needs, by op. */
const starts: Readonly<Record<string, string>> = { embed: "V", softmax_terms_grad: "V", dropout: "S", jitter: "S" };

/** Formula with a random word per element of `x`, named `word` (src/ops/dropout.ts). */
function atRandom({ S, D, chunk, ranks }: Sizes, start: string, y: string): CudaFormula {
  return {
    ...{ streams: ["x"], indexed: ["sample"], width: D!, attrs: runtimeAttrs, functions: [render("cuda/philox.cuh", {})] },
    row: [
      `const u32 c = u32(at % (${D} / N)) * N, index = u32(${start}) + u32(row % ${S}), position = ${positionText("index", chunk!, ranks!)};`,
      `const u32 sequence = u32(sampleAt[row / ${S}]);`,
      "uint4 words[(N + 3) / 4];",
      "for (int n = 0; n < (N + 3) / 4; n++) words[n] = philox(uint4{sequence, position, c / 4 + n, 0}, key0, key1);",
    ],
    element: ["const u32 word = wordOf(words[j / 4], (c + j) % 4);"],
    outputs: { y },
  };
}

export const elementwise: Readonly<Record<string, CudaGenerator>> = Object.fromEntries(
  Object.entries(formulas).map(([op, formula]) => [
    op,
    (spec: KernelSpec, arch: Arch) => makeElementwise(spec, arch, formula(spec.d, "start"), starts[op]),
  ]),
);

const THREADS = 256;
export function makeElementwise(spec: KernelSpec, arch: Arch, f: CudaFormula, start?: string): GeneratedKernel {
  const names = Object.keys(f.outputs);
  const numbers = f.numbers ?? [];
  const total = spec.size[names[0]!]!;
  const row = f.width ?? (spec.bound > 0 ? total / spec.bound : total);
  const loaded = [...f.streams, ...Object.keys(f.gathers ?? {})];
  const types = [...loaded, ...names].map((name) => spec.dtype[name]!);
  const width = vectorOf(row, types);
  // 128 bytes in flight per thread saturate memory; without loads the stores decide
  const inFlight = loaded.reduce((n, name) => n + width * bytesOf[spec.dtype[name]!], 0) || 32;
  let unroll = Math.max(1, Math.min(4, Math.floor(128 / inFlight)));
  while (unroll > 1 && total / width < THREADS * unroll * 4 * cudaArchs[arch].multiprocessors) unroll = Math.floor(unroll / 2);
  const indexed = [...(f.scalars ?? []), ...(f.indexed ?? [])];
  const inputs = [...loaded.filter((name) => !names.includes(name)), ...indexed];
  const vectors = total / width;
  const body = render("cuda/elementwise.cu", {
    ...{ name: spec.name, width, unroll, threads: THREADS },
    index: vectors + THREADS * unroll < 2 ** 31 ? "u32" : "u64",
    end: spec.bound > 0 ? `Index(rows[0]) * ${row / width}` : vectors,
    params: [
      ...inputs.map((name) => `const ${cudaType(spec.dtype[name]!)}* __restrict__ ${name}At`),
      ...[...names, ...numbers].map((name) => `${cudaType(spec.dtype[name]!)}* ${name}At`),
      ...(spec.bound > 0 ? ["const int* rows"] : []),
      ...(start ? ["int start"] : []),
      ...(f.attrs ?? []).map((name) => `u32 ${name}`),
    ].join(", "),
    scalars: f.scalars ?? [],
    once: f.once ?? [],
    row: f.width && f.row ? [`const Index row = at / (${row} / N);`, ...f.row] : [],
    element: f.element ?? [],
    inputs: loaded.map((name) => ({
      name,
      type: cudaType(spec.dtype[name]!),
      load: f.gathers?.[name] ?? `${name}In[k] = ${name}In[k].load(${name}At + i64(at) * N);`,
    })),
    outputs: names.map((name) => ({ name, value: f.outputs[name]! })),
  });
  return {
    source: source(spec, [...(f.functions ?? []), body].join("\n")),
    launches: [
      {
        entry: spec.name,
        grid: [Math.ceil(vectors / (THREADS * unroll)), 1, 1],
        ...{ threads: THREADS, shared: 0 },
        args: [
          ...[...inputs, ...names, ...numbers, ...(spec.bound > 0 ? ["rows"] : [])],
          ...[...(start ? [startOf(start)] : []), ...(f.attrs ?? []).map((name) => attributeOf(name))],
        ],
      },
    ],
  };
}

/** Returns the vector width in elements: 16 bytes of the narrowest type, halved until it divides the row. */
export function vectorOf(row: number, types: readonly Dtype[]): number {
  let width = 16 / Math.min(...types.map((t) => bytesOf[t]));
  while (row % width !== 0) width /= 2;
  return width;
}

/** Returns a number as a CUDA f32 literal. */
export function f32(x: number): string {
  const text = String(Math.fround(x));
  return /[.e]/.test(text) ? `${text}f` : `${text}.0f`;
}
