/** What meets the vocabulary, beside what is elementwise: reductions over a row of logits, the target's logit, the table's gradient. */

import type { Launch } from "../../../schemas/plan.ts";
import { bytesOf } from "../../../schemas/sharding.ts";
import { render } from "../../../templates/bindings.ts";
import type { CudaMaker, Made, Use } from "../kernelSpec.ts";
import { cudaType, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
import { source } from "./prelude.ts";

export const vocab: Readonly<Record<string, CudaMaker>> = {
  row_max: (use) => reduceRows(use, { what: "largest element", op: "Max", term: "x", scalars: [], to: "m" }),
  sum_exp: (use) => reduceRows(use, { what: "sum of exp(x − m)", op: "Sum", term: "fastExp(x - m)", scalars: ["m"], to: "s" }),
  pick,
  embed_grad: embedGrad,
};

interface Reduction {
  readonly what: string;
  readonly op: "Sum" | "Max";
  readonly term: string;
  readonly scalars: readonly string[];
  readonly to: string;
}

function reduceRows(use: Use, { to, scalars, ...how }: Reduction): Made {
  const width = use.d.V!;
  const rows = use.size[to]!;
  const unroll = 4;
  const { vector, lanes, threads } = shareRow(width, vectorOf(width, [use.dtype.x!]), 2 * unroll);
  const own = { lanes: Math.min(512, lanes), threads: Math.min(512, threads) };
  const body = render("cuda/row_reduce.cu", {
    ...{ name: use.name, ...how, ...own, vector, unroll, width, rows, x: cudaType(use.dtype.x!), out: cudaType(use.dtype[to]!) },
    scalars: scalars.map((name) => ({ name, type: cudaType(use.dtype[name]!) })),
  });
  const grid: [number, number, number] = [Math.ceil(rows / (own.threads / own.lanes)), 1, 1];
  return {
    source: source(use, body),
    launches: [{ entry: use.name, grid, threads: own.threads, shared: 0, args: ["x", ...scalars, to] }],
  };
}

function pick(use: Use): Made {
  const rows = use.size.p!;
  const body = render("cuda/pick.cu", { name: use.name, rows, width: use.d.V!, x: cudaType(use.dtype.x!), p: cudaType(use.dtype.p!) });
  return {
    source: source(use, body),
    launches: [{ entry: use.name, grid: [Math.ceil(rows / 256), 1, 1], threads: 256, shared: 0, args: ["x", "target", "p", "start(V)"] }],
  };
}

const THREADS = 128;
/** Tokens that a block lists before it adds them up: 13 bytes each. */
const CAPACITY = 2048;

function embedGrad(use: Use): Made {
  const { V, D } = use.d;
  const tokens = use.size.ids!;
  const vector = vectorOf(D!, [use.dtype.dy!]);
  const slices = Math.ceil(D! / (vector * THREADS));
  // each block reads all ids, from the second-level cache, and adds some 64 rows
  const buckets = Math.min(256, 2 ** Math.ceil(Math.log2(Math.max(1, tokens / 64))));
  const clear = use.keeps.has("dtable") ? undefined : clearBuffer(use, "dtable");
  const body = render("cuda/embed_grad.cu", {
    ...{
      name: use.name,
      vector,
      threads: THREADS,
      capacity: CAPACITY,
      buckets,
      tokens,
      vocabulary: V!,
      width: D!,
      columns: vector * THREADS,
    },
    ...{ dy: cudaType(use.dtype.dy!), dtable: cudaType(use.dtype.dtable!) },
  });
  return {
    source: source(use, [clear?.body, body].join("\n")),
    launches: [
      ...(clear ? [clear.launch] : []),
      { entry: use.name, grid: [buckets, slices, 1], threads: THREADS, shared: 0, args: ["ids", "dy", "dtable", "start(V)"] },
    ],
  };
}

/** A launch that fills an operand with zeros; its bytes are a multiple of 4. */
export function clearBuffer(use: Use, name: string): { body: string; launch: Launch } {
  const entry = `${use.name}_clear`;
  const words = Math.ceil((use.size[name]! * bytesOf[use.dtype[name]!]) / 4);
  const grid = Math.min(4096, Math.ceil(words / 1024));
  return {
    body: render("cuda/clear.cu", { name: entry, words, grid }),
    launch: { entry, grid: [grid, 1, 1], threads: 256, shared: 0, args: [name] },
  };
}
