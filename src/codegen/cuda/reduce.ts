/** Sums that end in one number, in two launches: blocks leave their parts in the scratch arena, one block adds these in a fixed order. */

import type { Launch } from "../../../schemas/plan.ts";
import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import type { CudaMaker, Made, Use } from "../kernelSpec.ts";
import type { Arch } from "../targetNames.ts";
import { cudaType, f32, processors, vectorOf } from "./elementwise.ts";
import { source } from "./prelude.ts";

interface Sum {
  /** The operand whose elements are `x` in the term. */
  readonly over: string;
  readonly to: string;
  readonly factor: number;
  readonly term: string;
  /** A further input, which `row` and the term index. */
  readonly beside?: string;
  /** Elements within which a vector lies. */
  readonly width?: number;
  readonly row?: readonly string[];
}

export const reduce: Readonly<Record<string, CudaMaker>> = {
  mean: (use, arch) => makeSum(use, arch, { over: "l", to: "y", factor: 1 / use.d.count!, term: "x" }),
  weighted_sum: (use, arch) =>
    makeSum(use, arch, {
      ...{ over: "l", to: "y", factor: 1, term: "x * weight[j]", beside: "weight" },
      row: ["const float* weight = weightAt + i64(at) * N;"],
    }),
  dropped_rows: (use, arch) =>
    makeSum(use, arch, {
      ...{ over: "c", to: "y", factor: 1, term: "x * (1.0f - d[j])", beside: "d" },
      row: ["const float* d = dAt + i64(at) * N;"],
    }),
  sum_squares: (use, arch) => makeSum(use, arch, { over: "g", to: "y", factor: use.d.scale!, term: "x * x" }),
  aux_loss: (use, arch) => auxLoss(use, arch, use.d.P! * use.d.S! * use.d.E!),
  global_aux_loss: (use, arch) => auxLoss(use, arch, use.size.p!),
};

/** Σ p·n, with counts for every `batch` elements of p. */
function auxLoss(use: Use, arch: Arch, batch: number): Made {
  const { E, c } = use.d;
  return makeSum(use, arch, {
    ...{ over: "p", to: "y", factor: c!, term: "x * n[j]", beside: "n", width: E! },
    row: [`const float* n = nAt + i64(at / (${batch} / N)) * ${E} + int(at % (${E} / N)) * N;`],
  });
}

const BLOCKS_EACH = 8;

function makeSum(use: Use, arch: Arch, s: Sum): Made {
  const type = use.dtype[s.over]!;
  const total = use.size[s.over]!;
  const vector = vectorOf(s.width ?? total, [type]);
  const unroll = 4;
  const grid = Math.min(Math.ceil(total / (vector * unroll * 256)), processors[arch] * BLOCKS_EACH);
  const beside = s.beside ? [s.beside] : [];
  const body = render("cuda/sum.cu", {
    ...{ name: use.name, vector, unroll, grid, factor: f32(s.factor), term: s.term, type: cudaType(type), row: s.row ?? [] },
    index: total / vector + 1024 * grid < 2 ** 31 ? "u32" : "u64",
    end: total / vector,
    params: [`const ${cudaType(type)}* xAt`, ...beside.map((n) => `const ${cudaType(use.dtype[n]!)}* ${n}At`)].join(", "),
  });
  const last = addParts(use, grid, s.to);
  return {
    source: source(use, `${body}\n${last.body}`),
    scratch: grid * bytesOf.f32,
    launches: [{ entry: use.name, grid: [grid, 1, 1], threads: 256, shared: 0, args: [s.over, ...beside, "scratch+0"] }, last.launch],
  };
}

/** The launch that adds `count` parts, which lie at the beginning of the scratch arena, to (or into) a scalar. */
export function addParts(use: Use, count: number, to: string): { body: string; launch: Launch } {
  const entry = `${use.name}_total`;
  const threads = count > 256 ? 1024 : 256;
  return {
    body: render("cuda/total.cu", { name: entry, count, threads, type: cudaType(use.dtype[to]!), adds: use.keeps.has(to) }),
    launch: { entry, grid: [1, 1, 1], threads, shared: 0, args: ["scratch+0", to] },
  };
}
