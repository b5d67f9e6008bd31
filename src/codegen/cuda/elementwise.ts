/** Elementwise kernels: an output element depends on the input elements at the same index, on values per row and on scalars. */

import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { attentionMerge } from "../../ops/attention.ts";
import { dropout, dropsOf, jitter, runtimeAttrs } from "../../ops/dropout.ts";
import { addBiasRows } from "../../ops/gemm.ts";
import type { OperandName } from "../../ops/op.ts";
import { embed, softmaxTermsGrad } from "../../ops/vocab.ts";
import { cudaKernel, type GeneratedKernel, type KernelOperand, type KernelSpec, operandOf, positionText } from "../kernelSpec.ts";
import { attributeOf, rowIndex, startOf } from "../launchArgs.ts";
import { f32, source, vectorOf } from "./text.ts";

/** The expressions of an elementwise kernel. The name of an operand is its element, `row` the row index, `<name>At` the pointer of an operand. */
export interface CudaElementwise {
  /** Inputs with as many elements as the outputs, and others that are loaded as vectors. */
  readonly streams: readonly Stream[];
  /** Inputs with a single element. */
  readonly scalars?: readonly KernelOperand[];
  /** Inputs that the statements in `row` or `element` index. */
  readonly indexed?: readonly KernelOperand[];
  /** Elements per row; a vector does not cross the end of a row. */
  readonly width?: number;
  /** Outputs with one element per row, written by the statements in `row` at the start of a row. */
  readonly rowOutputs?: readonly KernelOperand[];
  readonly once?: readonly string[];
  readonly row?: readonly string[];
  readonly element?: readonly string[];
  readonly outputs: readonly [Output, ...Output[]];
  /** Declarations before the kernel. */
  readonly functions?: readonly string[];
  /** The dim whose global start the kernel receives as `start`. */
  readonly start?: string;
  /** Runtime attributes, passed as u32. */
  readonly attrs?: readonly string[];
}
interface Stream extends KernelOperand {
  /** The statement that loads a vector into `<name>In[k]`, where `at` is the index of the output vector; default: the vector at `at`. */
  readonly load?: string;
}
interface Output extends KernelOperand {
  readonly value: string;
}

const THREADS = 256;

/** Returns how many vectors a thread loads before it uses the first: fewer if there would be less than four blocks for each multiprocessor. */
export function unrollOf(
  streams: readonly KernelOperand[],
  { vectors, width, multiprocessors }: { readonly vectors: number; readonly width: number; readonly multiprocessors: number },
): number {
  // 128 bytes in flight per thread saturate memory; without loads the stores decide
  const inFlight = streams.reduce((n, o) => n + width * bytesOf[o.dtype], 0) || 32;
  let unroll = Math.max(1, Math.min(4, Math.floor(128 / inFlight)));
  while (unroll > 1 && vectors < THREADS * unroll * 4 * multiprocessors) unroll = Math.floor(unroll / 2);
  return unroll;
}

/** Generates a kernel in which each thread loads several vectors before it uses the first. */
export function makeElementwise(spec: KernelSpec, arch: Arch, f: CudaElementwise): GeneratedKernel {
  const { streams, outputs, scalars = [], indexed = [], rowOutputs = [], attrs = [] } = f;
  const total = outputs[0].size;
  const row = f.width ?? (spec.bound > 0 ? total / spec.bound : total);
  const width = vectorOf(
    row,
    [...streams, ...outputs].map((o) => o.dtype),
  );
  const unroll = unrollOf(streams, { vectors: total / width, width, multiprocessors: cudaArchs[arch].multiprocessors });
  const written = [...outputs, ...rowOutputs];
  const inputs = [...streams.filter((o) => !written.some((w) => w.name === o.name)), ...scalars, ...indexed];
  const ragged = spec.bound > 0;
  const vectors = total / width;
  const body = render("cuda/elementwise.cu", {
    ...{ name: spec.name, width, unroll, threads: THREADS },
    index: vectors + THREADS * unroll < 2 ** 31 ? "u32" : "u64",
    end: ragged ? `Index(rows[0]) * ${row / width}` : vectors,
    params: [
      ...inputs.map((o) => `const ${cudaType(o.dtype)}* __restrict__ ${o.name}At`),
      ...written.map((o) => `${cudaType(o.dtype)}* ${o.name}At`),
      ...(ragged ? ["const int* rows"] : []),
      ...(f.start ? ["int start"] : []),
      ...attrs.map((name) => `u32 ${name}`),
    ].join(", "),
    scalars: scalars.map((o) => o.name),
    once: f.once ?? [],
    row: f.width && f.row?.length ? [`const Index row = at / (${row} / N);`, ...f.row] : [],
    element: f.element ?? [],
    inputs: streams.map(({ name, dtype, load = `${name}In[k] = ${name}In[k].load(${name}At + i64(at) * N);` }) => ({
      ...{ name, load },
      type: cudaType(dtype),
    })),
    outputs: outputs.map(({ name, value }, n) => {
      // one expression has one contraction of products and sums, so that kernels with and without the second output have the same bits
      const same = outputs.slice(0, n).find((earlier) => earlier.value === value);
      return { name, value: same ? `${same.name}Out[j]` : value };
    }),
  });
  const operands = [...inputs, ...written].map((o) => o.name);
  const args = [...operands, ...(ragged ? [rowIndex] : []), ...(f.start ? [startOf(f.start)] : []), ...attrs.map((a) => attributeOf(a))];
  return {
    source: source(spec, [...(f.functions ?? []), body].join("\n")),
    launches: [{ entry: spec.name, grid: [Math.ceil(vectors / (THREADS * unroll)), 1, 1], threads: THREADS, shared: 0, args }],
  };
}

/** Expressions with a random word per element of `x`, named `word` (src/ops/dropout.ts). */
function atRandom(spec: KernelSpec<OperandName<typeof dropout>, "S" | "D" | "chunk" | "ranks">, value: string): CudaElementwise {
  const { S, D, chunk, ranks } = spec.d;
  return {
    ...{ streams: [operandOf(spec, "x")], indexed: [operandOf(spec, "sample")], width: D, start: "S", attrs: runtimeAttrs },
    functions: [render("cuda/philox.cuh", {})],
    row: [
      `const u32 c = u32(at % (${D} / N)) * N, index = u32(start) + u32(row % ${S}), position = ${positionText("index", chunk, ranks)};`,
      `const u32 sequence = u32(sampleAt[row / ${S}]);`,
      "uint4 words[(N + 3) / 4];",
      "for (int n = 0; n < (N + 3) / 4; n++) words[n] = philox(uint4{sequence, position, c / 4 + n, 0}, key0, key1);",
    ],
    element: ["const u32 word = wordOf(words[j / 4], (c + j) % 4);"],
    outputs: [{ ...operandOf(spec, "y"), value }],
  };
}

/** CUDA kernels of dropout, sums and copies. */
export const elementwise = {
  add_bias_rows: cudaKernel(addBiasRows, (spec, arch) => {
    const { N } = spec.d;
    const load = `biasIn[k] = biasIn[k].load(biasAt + i64(rows[3 + 3 * i64(at / (${N} / N))] - start) * ${N} + int(at % (${N} / N)) * N);`;
    return makeElementwise(spec, arch, {
      ...{ streams: [operandOf(spec, "x"), { ...operandOf(spec, "bias"), load }], width: N, start: "E" },
      outputs: [{ ...operandOf(spec, "y"), value: "x + bias" }],
    });
  }),
  embed: cudaKernel(embed, (spec, arch) => {
    const { V, D } = spec.d;
    const load = [
      `const int id = idsAt[at / (${D} / N)] - start;`,
      "tableIn[k] = {};",
      `if (id >= 0 && id < ${V}) tableIn[k] = tableIn[k].load(tableAt + i64(id) * ${D} + at % (${D} / N) * N);`,
    ].join(" ");
    return makeElementwise(spec, arch, {
      ...{ streams: [{ ...operandOf(spec, "table"), load }], indexed: [operandOf(spec, "ids")], width: D, start: "V" },
      outputs: [{ ...operandOf(spec, "x"), value: "table" }],
    });
  }),
  softmax_terms_grad: cudaKernel(softmaxTermsGrad, (spec, arch) =>
    makeElementwise(spec, arch, {
      ...{ streams: [operandOf(spec, "x")], width: spec.d.V, start: "V" },
      indexed: [operandOf(spec, "m"), operandOf(spec, "target"), operandOf(spec, "ds"), operandOf(spec, "dp")],
      row: [
        "const float m = widen(mAt[row]), ds = widen(dsAt[row]), dp = widen(dpAt[row]);",
        // an id of another shard is below 0 or at least V, so it matches no element
        `const int here = targetAt[row] - start - int(at % (${spec.d.V} / N)) * N;`,
        ...(spec.d.ids === undefined ? [] : [`const int end = ${spec.d.ids} - start - int(at % (${spec.d.V} / N)) * N;`]),
      ],
      outputs: [
        {
          ...operandOf(spec, "dx"),
          value: `${spec.d.ids === undefined ? "ds * fastExp(x - m)" : "(j < end ? ds * fastExp(x - m) : 0.0f)"} + (j == here ? dp : 0.0f)`,
        },
      ],
    }),
  ),
  dropout: cudaKernel(dropout, (spec, arch) => {
    const { threshold, factor } = dropsOf(spec.d.drop);
    return makeElementwise(spec, arch, atRandom(spec, `word < ${threshold}u ? 0.0f : x * ${f32(factor)}`));
  }),
  jitter: cudaKernel(jitter, (spec, arch) =>
    makeElementwise(spec, arch, atRandom(spec, `x * (1.0f + ${f32(spec.d.eps)} * (float(word >> 8) * 0x1p-23f - 1.0f))`)),
  ),
  // a shard without visible keys has lse = −∞; the difference of two −∞ is avoided
  attention_merge: cudaKernel(attentionMerge, (spec, arch) =>
    makeElementwise(spec, arch, {
      ...{ streams: [operandOf(spec, "a"), operandOf(spec, "b")], indexed: [operandOf(spec, "la"), operandOf(spec, "lb")] },
      ...{ width: spec.d.W, rowOutputs: [operandOf(spec, "lse")] },
      row: [
        "const float la = laAt[row], lb = lbAt[row], most = fmaxf(la, lb), from = most == Max::none ? 0.0f : most;",
        "const float wa = fastExp(la - from), wb = fastExp(lb - from), sum = wa + wb, by = sum > 0.0f ? 1.0f / sum : 0.0f;",
        `if (at % (${spec.d.W} / N) == 0) lseAt[row] = from + logf(sum);`,
      ],
      outputs: [{ ...operandOf(spec, "o"), value: "(wa * a + wb * b) * by" }],
    }),
  ),
};
