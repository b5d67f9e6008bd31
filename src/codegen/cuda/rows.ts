/** Rows: which there are, and what moves between tokens and their rows. Making them, and finding a token's, costs a few small launches. */
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import { type CudaGenerator, type GeneratedKernel, type KernelSpec, offsetsAt } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, scratch, scratchStart, startOf } from "../launchArgs.ts";
import { cudaType, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
import { source } from "./prelude.ts";
import { clearBuffer } from "./vocab.ts";

export const rows: Readonly<Record<string, CudaGenerator>> = {
  permute: (spec) => join(spec, spec.makesRows ? makeRows(spec, true) : mapRows(spec), broadcastRows(spec)),
  unpermute: (spec) => join(spec, mapRows(spec), reducePartials(spec)),
  pack: (spec) =>
    spec.makesRows
      ? join(spec, makeRows(spec, false))
      : join(spec, perRow(spec, { what: "the token's weight", from: "p", to: "r", target: "row", origin: "cell" })),
  pack_grad: (spec) => {
    const { body, launch } = clearBuffer(spec, "dp");
    const what = "its slope, where its weight is; others are zero";
    return join(spec, { body, launches: [launch] }, perRow(spec, { what, from: "dy", to: "dp", target: "cell", origin: "row" }));
  },
};

interface KernelPart {
  readonly body: string;
  readonly launches: readonly GeneratedLaunch[];
  readonly scratch?: number;
}
const join = (spec: KernelSpec, ...parts: readonly KernelPart[]): GeneratedKernel => ({
  source: source(spec, parts.map((p) => p.body).join("\n")),
  launches: parts.flatMap((p) => p.launches),
  scratch: Math.max(...parts.map((p) => p.scratch ?? 0)),
});

const sizesOf = ({ d }: KernelSpec) => ({ tokens: d.B! * d.S!, sequence: d.S!, experts: d.E! });
const starts = [startOf("B"), startOf("S"), startOf("E")];
const oneDim = (items: number, each: number): [number, number, number] => [Math.ceil(items / each), 1, 1];

/** The map from (token, expert) to its row lies first in the scratch arena. */
const mapBytes = (spec: KernelSpec): number => {
  const { tokens, experts } = sizesOf(spec);
  return Math.ceil((tokens * experts * 4) / 256) * 256;
};

function makeRows(spec: KernelSpec, map: boolean): KernelPart {
  const { tokens, sequence, experts } = sizesOf(spec);
  // __shared__ arrays of an int for each expert
  invariant(experts <= 8192, `rows of ${experts} experts`);
  const chunks = Math.ceil(tokens / 32);
  const cells = Math.ceil((chunks * experts * 4) / 256) * 256;
  const at = map ? mapBytes(spec) : 0;
  const [masks, before, totals] = [scratch(at), scratch(at + cells), scratch(at + 2 * cells)];
  const values = spec.op === "pack";
  const body = render("cuda/make_rows.cu", {
    ...{
      name: spec.name,
      tokens,
      sequence,
      experts,
      bound: spec.bound,
      offsetsAt: offsetsAt(spec.bound),
      overflow: spec.mayOverflow,
      map,
      values,
    },
    ...{ type: cudaType(spec.dtype.p ?? "f32"), out: cudaType(spec.dtype.r!) },
  });
  const launch = (step: string, grid: GeneratedLaunch["grid"], args: readonly KernelArg[]) => ({
    entry: `${spec.name}_${step}`,
    grid,
    threads: 256,
    shared: 0,
    args,
  });
  const outputs = ["rows", ...(spec.mayOverflow ? ["needed"] : []), ...(values ? ["p", "r"] : []), ...(map ? [scratchStart] : [])];
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

function mapRows(spec: KernelSpec): KernelPart {
  const { tokens, sequence, experts } = sizesOf(spec);
  const launch = (step: string, items: number, args: readonly KernelArg[]) => ({
    ...{ entry: `${spec.name}_${step}`, grid: oneDim(items, 256), threads: 256, shared: 0, args },
  });
  return {
    body: render("cuda/map_rows.cu", { name: spec.name, cells: tokens * experts, sequence, experts }),
    scratch: mapBytes(spec),
    launches: [launch("none", tokens * experts, [scratchStart]), launch("map", spec.bound, ["rows", scratchStart, ...starts])],
  };
}

function broadcastRows(spec: KernelSpec): KernelPart {
  invariant(spec.dtype.x === spec.dtype.r, "permute copies: both types are one");
  const { shares, ...how } = perToken(spec, 4);
  return {
    body: render("cuda/broadcast.cu", { name: spec.name, ...shares, ...how, type: cudaType(spec.dtype.x!) }),
    launches: [tokenLaunch(spec, shares, [scratchStart, "x", "r"])],
  };
}

function reducePartials(spec: KernelSpec): KernelPart {
  const { shares, ...how } = perToken(spec, 2);
  return {
    body: render("cuda/reduce_partials.cu", {
      name: spec.name,
      ...shares,
      ...how,
      deep: 4,
      type: cudaType(spec.dtype.r!),
      out: cudaType(spec.dtype.x!),
    }),
    launches: [tokenLaunch(spec, shares, [scratchStart, "r", "x"])],
  };
}

/** Whole warps per token: they vote on its experts. */
function perToken(spec: KernelSpec, most: number) {
  const width = spec.d.D!;
  const { tokens, experts } = sizesOf(spec);
  const shares = shareRow(width, vectorOf(width, [spec.dtype.x!, spec.dtype.r!]), most);
  const lanes = Math.max(32, shares.lanes);
  return { shares: { ...shares, lanes }, width, tokens, experts };
}
const tokenLaunch = (
  spec: KernelSpec,
  { threads, lanes }: { threads: number; lanes: number },
  args: readonly KernelArg[],
): GeneratedLaunch => ({
  ...{ entry: spec.name, grid: oneDim(sizesOf(spec).tokens, threads / lanes), threads, shared: 0, args },
});

function perRow(spec: KernelSpec, how: { what: string; from: string; to: string; target: string; origin: string }): KernelPart {
  const { sequence, experts } = sizesOf(spec);
  const types = { from: cudaType(spec.dtype[how.from]!), to: cudaType(spec.dtype[how.to]!) };
  return {
    body: render("cuda/pack.cu", { name: spec.name, ...how, ...types, sequence, experts }),
    launches: [{ entry: spec.name, grid: oneDim(spec.bound, 256), threads: 256, shared: 0, args: ["rows", how.from, how.to, ...starts] }],
  };
}
