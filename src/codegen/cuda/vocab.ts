/** Kernels of embedding and loss that are not elementwise: reductions over a row of logits, the gradient of the table. */

import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import type { CudaGenerator, GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, startOf } from "../launchArgs.ts";
import { cudaType, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
import { source } from "./prelude.ts";

export const vocab: Readonly<Record<string, CudaGenerator>> = {
  row_max: (spec) => reduceRows(spec, { what: "largest element", op: "Max", term: "x", scalars: [], to: "m" }),
  softmax_terms: (spec) =>
    reduceRows(spec, {
      ...{ what: "sum of exp(x − m), and the logit of its target", op: "Sum", term: "fastExp(x - m)", scalars: ["m"], to: "s" },
      beside: [
        { name: "target", type: "const int*" },
        { name: "p", type: `${cudaType(spec.dtype.p!)}*` },
        { name: "start", type: "int", arg: startOf("V") },
      ],
      after: [
        "const int v = target[row] - start;",
        `p[row] = narrow<${cudaType(spec.dtype.p!)}>(v >= 0 && v < ${spec.d.V} ? widen(xAt[row * ${spec.d.V} + v]) : 0.0f);`,
      ],
    }),
  embed_grad: embedGrad,
};

interface Reduction {
  readonly what: string;
  readonly op: "Sum" | "Max";
  readonly term: string;
  readonly scalars: readonly string[];
  readonly to: string;
  /** Further parameters, and statements that one thread of a row runs after the reduction. */
  readonly beside?: readonly { readonly name: string; readonly type: string; readonly arg?: KernelArg }[];
  readonly after?: readonly string[];
}

function reduceRows(spec: KernelSpec, { to, scalars, beside = [], after = [], ...how }: Reduction): GeneratedKernel {
  const width = spec.d.V!;
  const rows = spec.size[to]!;
  const unroll = 4;
  const { vector, lanes, threads } = shareRow(width, vectorOf(width, [spec.dtype.x!]), 2 * unroll);
  const own = { lanes: Math.min(512, lanes), threads: Math.min(512, threads) };
  const body = render("cuda/row_reduce.cu", {
    ...{ name: spec.name, ...how, ...own, vector, unroll, width, rows, x: cudaType(spec.dtype.x!), out: cudaType(spec.dtype[to]!) },
    scalars: scalars.map((name) => ({ name, type: cudaType(spec.dtype[name]!) })),
    beside: beside.map(({ name, type }) => ({ name, type })),
    after: [...after],
  });
  const grid: [number, number, number] = [Math.ceil(rows / (own.threads / own.lanes)), 1, 1];
  return {
    source: source(spec, body),
    launches: [
      {
        entry: spec.name,
        grid,
        threads: own.threads,
        shared: 0,
        args: ["x", ...scalars, to, ...beside.map(({ name, arg }) => arg ?? name)],
      },
    ],
  };
}

const THREADS = 128;
/** Tokens that a block lists before it sums their rows: 13 bytes each. */
const CAPACITY = 2048;

function embedGrad(spec: KernelSpec): GeneratedKernel {
  const { V, D } = spec.d;
  const tokens = spec.size.ids!;
  const vector = vectorOf(D!, [spec.dtype.dy!]);
  const slices = Math.ceil(D! / (vector * THREADS));
  // each block reads all ids, from the second-level cache, and adds some 64 rows
  const buckets = Math.min(256, 2 ** Math.ceil(Math.log2(Math.max(1, tokens / 64))));
  const clear = spec.accumulates.has("dtable") ? undefined : clearBuffer(spec, "dtable");
  const body = render("cuda/embed_grad.cu", {
    ...{
      name: spec.name,
      vector,
      threads: THREADS,
      capacity: CAPACITY,
      buckets,
      tokens,
      vocabulary: V!,
      width: D!,
      columns: vector * THREADS,
    },
    ...{ dy: cudaType(spec.dtype.dy!), dtable: cudaType(spec.dtype.dtable!) },
  });
  return {
    source: source(spec, [clear?.body, body].join("\n")),
    launches: [
      ...(clear ? [clear.launch] : []),
      { entry: spec.name, grid: [buckets, slices, 1], threads: THREADS, shared: 0, args: ["ids", "dy", "dtable", startOf("V")] },
    ],
  };
}

/** Returns a launch that fills an operand with zeros; its size is a multiple of 4 bytes. */
export function clearBuffer(spec: KernelSpec, name: string): { body: string; launch: GeneratedLaunch } {
  const entry = `${spec.name}_clear`;
  const words = Math.ceil((spec.size[name]! * bytesOf[spec.dtype[name]!]) / 4);
  const grid = Math.min(4096, Math.ceil(words / 1024));
  return {
    body: render("cuda/clear.cu", { name: entry, words, grid }),
    launch: { entry, grid: [grid, 1, 1], threads: 256, shared: 0, args: [name] },
  };
}
