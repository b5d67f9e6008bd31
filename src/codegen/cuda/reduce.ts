/** Reductions to a scalar in two launches: blocks write partial sums to scratch, then one block adds them in a fixed order. */

import { cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import type { CudaGenerator, GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { type GeneratedLaunch, scratchStart } from "../launchArgs.ts";
import type { Arch } from "../targetNames.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

interface Sum {
  /** The operand with the elements `x` of the term. */
  readonly over: string;
  readonly to: string;
  readonly factor: number;
  readonly term: string;
  /** An additional input that `row` and the term index. */
  readonly beside?: string;
  /** Elements per row; a vector does not cross the end of a row. */
  readonly width?: number;
  readonly row?: readonly string[];
}

export const reduce: Readonly<Record<string, CudaGenerator>> = {
  mean: (spec, arch) => makeSum(spec, arch, { over: "l", to: "y", factor: 1 / spec.d.count!, term: "x" }),
  weighted_sum: (spec, arch) =>
    makeSum(spec, arch, {
      ...{ over: "l", to: "y", factor: 1, term: "x * weight[j]", beside: "weight" },
      row: ["const float* weight = weightAt + i64(at) * N;"],
    }),
  dropped_rows: (spec, arch) =>
    makeSum(spec, arch, {
      ...{ over: "c", to: "y", factor: 1, term: "x * (1.0f - d[j])", beside: "d" },
      row: ["const float* d = dAt + i64(at) * N;"],
    }),
  sum_squares: (spec, arch) => makeSum(spec, arch, { over: "g", to: "y", factor: spec.d.scale!, term: "x * x" }),
  aux_loss: (spec, arch) => auxLoss(spec, arch, spec.d.P! * spec.d.S! * spec.d.E!),
  global_aux_loss: (spec, arch) => auxLoss(spec, arch, spec.size.p!),
};

/** Σ p·n, with one count vector per `batch` elements of p. */
function auxLoss(spec: KernelSpec, arch: Arch, batch: number): GeneratedKernel {
  const { E, c } = spec.d;
  return makeSum(spec, arch, {
    ...{ over: "p", to: "y", factor: c!, term: "x * n[j]", beside: "n", width: E! },
    row: [`const float* n = nAt + i64(at / (${batch} / N)) * ${E} + int(at % (${E} / N)) * N;`],
  });
}

const BLOCKS_EACH = 8;

function makeSum(spec: KernelSpec, arch: Arch, s: Sum): GeneratedKernel {
  const type = spec.dtype[s.over]!;
  const total = spec.size[s.over]!;
  const vector = vectorOf(s.width ?? total, [type]);
  const unroll = 4;
  const grid = Math.min(Math.ceil(total / (vector * unroll * 256)), cudaArchs[arch].multiprocessors * BLOCKS_EACH);
  const beside = s.beside ? [s.beside] : [];
  const body = render("cuda/sum.cu", {
    ...{ name: spec.name, vector, unroll, grid, factor: f32(s.factor), term: s.term, type: cudaType(type), row: s.row ?? [] },
    index: total / vector + 1024 * grid < 2 ** 31 ? "u32" : "u64",
    end: total / vector,
    params: [`const ${cudaType(type)}* xAt`, ...beside.map((n) => `const ${cudaType(spec.dtype[n]!)}* ${n}At`)].join(", "),
  });
  const last = addParts(spec, grid, s.to);
  return {
    source: source(spec, `${body}\n${last.body}`),
    scratch: grid * bytesOf.f32,
    launches: [{ entry: spec.name, grid: [grid, 1, 1], threads: 256, shared: 0, args: [s.over, ...beside, scratchStart] }, last.launch],
  };
}

/** Returns the launch that sums `count` partial sums at the beginning of scratch and stores or adds the result to a scalar. */
export function addParts(spec: KernelSpec, count: number, to: string): { body: string; launch: GeneratedLaunch } {
  const entry = `${spec.name}_total`;
  const threads = count > 256 ? 1024 : 256;
  return {
    body: render("cuda/total.cu", { name: entry, count, threads, type: cudaType(spec.dtype[to]!), adds: spec.accumulates.has(to) }),
    launch: { entry, grid: [1, 1, 1], threads, shared: 0, args: [scratchStart, to] },
  };
}
