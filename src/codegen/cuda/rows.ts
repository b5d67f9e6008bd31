/** Rows: which there are, and what moves between tokens and their rows. Making them, and finding a token's, costs a few small launches. */
import type { Launch } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import { type CudaMaker, type Made, offsetsAt, type Use } from "../kernelSpec.ts";
import { cudaType, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
import { source } from "./prelude.ts";
import { clearBuffer } from "./vocab.ts";

export const rows: Readonly<Record<string, CudaMaker>> = {
  permute: (use) => join(use, use.makesRows ? makeRows(use, true) : mapRows(use), spread(use)),
  unpermute: (use) => join(use, mapRows(use), collect(use)),
  pack: (use) =>
    use.makesRows
      ? join(use, makeRows(use, false))
      : join(use, perRow(use, { what: "the token's weight", from: "p", to: "r", target: "row", origin: "cell" })),
  pack_grad: (use) => {
    const { body, launch } = clearBuffer(use, "dp");
    const what = "its slope, where its weight is; others are zero";
    return join(use, { body, launches: [launch] }, perRow(use, { what, from: "dy", to: "dp", target: "cell", origin: "row" }));
  },
};

interface Part {
  readonly body: string;
  readonly launches: readonly Launch[];
  readonly scratch?: number;
}
const join = (use: Use, ...parts: readonly Part[]): Made => ({
  source: source(use, parts.map((p) => p.body).join("\n")),
  launches: parts.flatMap((p) => p.launches),
  scratch: Math.max(...parts.map((p) => p.scratch ?? 0)),
});

const sizesOf = ({ d }: Use) => ({ tokens: d.B! * d.S!, sequence: d.S!, experts: d.E! });
const starts = ["start(B)", "start(S)", "start(E)"];
const oneDim = (items: number, each: number): [number, number, number] => [Math.ceil(items / each), 1, 1];

/** The map from (token, expert) to its row lies first in the scratch arena. */
const mapBytes = (use: Use): number => {
  const { tokens, experts } = sizesOf(use);
  return Math.ceil((tokens * experts * 4) / 256) * 256;
};

function makeRows(use: Use, map: boolean): Part {
  const { tokens, sequence, experts } = sizesOf(use);
  // __shared__ arrays of an int for each expert
  invariant(experts <= 8192, `rows of ${experts} experts`);
  const chunks = Math.ceil(tokens / 32);
  const cells = Math.ceil((chunks * experts * 4) / 256) * 256;
  const at = map ? mapBytes(use) : 0;
  const [masks, before, totals] = [at, at + cells, at + 2 * cells].map((n) => `scratch+${n}`) as [string, string, string];
  const values = use.op === "pack";
  const body = render("cuda/make_rows.cu", {
    ...{
      name: use.name,
      tokens,
      sequence,
      experts,
      bound: use.bound,
      offsetsAt: offsetsAt(use.bound),
      overflow: use.mayOverflow,
      map,
      values,
    },
    ...{ type: cudaType(use.dtype.p ?? "f32"), out: cudaType(use.dtype.r!) },
  });
  const launch = (step: string, grid: Launch["grid"], args: string[]) => ({
    entry: `${use.name}_${step}`,
    grid,
    threads: 256,
    shared: 0,
    args,
  });
  const outputs = ["rows", ...(use.mayOverflow ? ["needed"] : []), ...(values ? ["p", "r"] : []), ...(map ? ["scratch+0"] : [])];
  return {
    body,
    scratch: at + 2 * cells + experts * 4,
    launches: [
      launch("mark", [chunks, 1, 1], ["c", masks]),
      launch("scan", [experts, 1, 1], [masks, before, totals]),
      launch("place", oneDim(tokens * experts, 2048), [masks, before, totals, ...outputs, ...starts]),
    ],
  };
}

function mapRows(use: Use): Part {
  const { tokens, sequence, experts } = sizesOf(use);
  const launch = (step: string, items: number, args: string[]) => ({
    ...{ entry: `${use.name}_${step}`, grid: oneDim(items, 256), threads: 256, shared: 0, args },
  });
  return {
    body: render("cuda/map_rows.cu", { name: use.name, cells: tokens * experts, sequence, experts }),
    scratch: mapBytes(use),
    launches: [launch("none", tokens * experts, ["scratch+0"]), launch("map", use.bound, ["rows", "scratch+0", ...starts])],
  };
}

function spread(use: Use): Part {
  invariant(use.dtype.x === use.dtype.r, "permute copies: both types are one");
  const { shares, ...how } = perToken(use, 4);
  return {
    body: render("cuda/spread.cu", { name: use.name, ...shares, ...how, type: cudaType(use.dtype.x!) }),
    launches: [tokenLaunch(use, shares, ["scratch+0", "x", "r"])],
  };
}

function collect(use: Use): Part {
  const { shares, ...how } = perToken(use, 2);
  return {
    body: render("cuda/collect.cu", {
      name: use.name,
      ...shares,
      ...how,
      deep: 4,
      type: cudaType(use.dtype.r!),
      out: cudaType(use.dtype.x!),
    }),
    launches: [tokenLaunch(use, shares, ["scratch+0", "r", "x"])],
  };
}

/** Whole warps per token: they vote on its experts. */
function perToken(use: Use, most: number) {
  const width = use.d.D!;
  const { tokens, experts } = sizesOf(use);
  const shares = shareRow(width, vectorOf(width, [use.dtype.x!, use.dtype.r!]), most);
  const lanes = Math.max(32, shares.lanes);
  return { shares: { ...shares, lanes }, width, tokens, experts };
}
const tokenLaunch = (use: Use, { threads, lanes }: { threads: number; lanes: number }, args: string[]): Launch => ({
  ...{ entry: use.name, grid: oneDim(sizesOf(use).tokens, threads / lanes), threads, shared: 0, args },
});

function perRow(use: Use, how: { what: string; from: string; to: string; target: string; origin: string }): Part {
  const { sequence, experts } = sizesOf(use);
  const types = { from: cudaType(use.dtype[how.from]!), to: cudaType(use.dtype[how.to]!) };
  return {
    body: render("cuda/pack.cu", { name: use.name, ...how, ...types, sequence, experts }),
    launches: [{ entry: use.name, grid: oneDim(use.bound, 256), threads: 256, shared: 0, args: ["rows", how.from, how.to, ...starts] }],
  };
}
