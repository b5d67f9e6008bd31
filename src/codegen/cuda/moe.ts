/** Kernels of rows of experts: the row index, permute and unpermute, and the combine weights of rows. */

import { cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { unpermuteAdd } from "../../ops/fused.ts";
import { pack, packGrad, permute, unpermute } from "../../ops/moe.ts";
import { invariant } from "../../ops/op.ts";
import { cudaKernel, type GeneratedKernel, type KernelOperand, type KernelSpec, offsetsAt, operandOf } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, neededRows, rowIndex, scratch, scratchStart, startOf } from "../launchArgs.ts";
import { clearBuffer } from "./reduce.ts";
import { shareRow, source, vectorOf } from "./text.ts";

type RowsSpec = KernelSpec<string, "B" | "S" | "E">;
type CopySpec = KernelSpec<"x" | "r", "B" | "S" | "E" | "D">;

/** The kernels of rows; those of lists (dispatch.ts) are the same with other sizes. */
export const rowKernels = {
  permute: (spec: CopySpec) => join(spec, spec.makesRows ? makeRows(spec, true) : mapRows(spec), broadcastRows(spec)),
  unpermute: (spec: CopySpec) => join(spec, mapRows(spec), reducePartials(spec)),
  pack(spec: RowsSpec) {
    const [from, to] = [operandOf(spec, "p"), operandOf(spec, "r")];
    if (spec.makesRows) return join(spec, makeRows(spec, false, { from, to }));
    return join(spec, perRow(spec, { what: "the combine weight of each row", from, to, target: "row", origin: "cell" }));
  },
  packGrad(spec: RowsSpec) {
    const to = operandOf(spec, "dp");
    const { body, launch } = clearBuffer(spec, to);
    const what = "the gradient of each chosen weight; the others are zero";
    return join(spec, { body, launches: [launch] }, perRow(spec, { what, from: operandOf(spec, "dy"), to, target: "cell", origin: "row" }));
  },
};

/** CUDA kernels of dispatch and combine. */
export const moe = {
  permute: cudaKernel(permute, rowKernels.permute),
  unpermute: cudaKernel(unpermute, rowKernels.unpermute),
  unpermute_add: cudaKernel(unpermuteAdd, (spec) => join(spec, mapRows(spec), reducePartials(spec, operandOf(spec, "z")))),
  pack: cudaKernel(pack, rowKernels.pack),
  pack_grad: cudaKernel(packGrad, rowKernels.packGrad),
};

/** A part of a kernel: text, launches, and bytes of scratch. */
export interface RowsKernelPart {
  readonly body: string;
  readonly launches: readonly GeneratedLaunch[];
  readonly scratch?: number;
}
/** Returns the kernel of some parts, which run one after another. */
export const join = (spec: KernelSpec, ...parts: readonly RowsKernelPart[]): GeneratedKernel => ({
  source: source(spec, parts.map((p) => p.body).join("\n")),
  launches: parts.flatMap((p) => p.launches),
  scratch: Math.max(...parts.map((p) => p.scratch ?? 0)),
});

const sizesOf = ({ d }: RowsSpec) => ({ tokens: d.B * d.S, sequence: d.S, experts: d.E });
const starts = [startOf("B"), startOf("S"), startOf("E")];
const oneDim = (items: number, each: number): [number, number, number] => [Math.ceil(items / each), 1, 1];

/** Bytes of the map from (token, expert) to its row, which is at the beginning of scratch. */
const mapBytes = (spec: RowsSpec): number => {
  const { tokens, experts } = sizesOf(spec);
  return Math.ceil((tokens * experts * 4) / 256) * 256;
};

/** Makes the row index from the top-k mask, in three launches. It also writes the map, or the combine weights. */
export function makeRows(
  spec: RowsSpec,
  map: boolean,
  weights?: { readonly from: KernelOperand; readonly to: KernelOperand },
): RowsKernelPart {
  const { tokens, sequence, experts } = sizesOf(spec);
  // __shared__ arrays of an int for each expert
  invariant(experts <= 8192, `shared memory cannot hold counts of ${experts} experts`);
  const chunks = Math.ceil(tokens / 32);
  const cells = Math.ceil((chunks * experts * 4) / 256) * 256;
  const at = map ? mapBytes(spec) : 0;
  const [masks, before, totals] = [scratch(at), scratch(at + cells), scratch(at + 2 * cells)];
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
      values: weights !== undefined,
    },
    ...{ type: cudaType(weights?.from.dtype ?? "f32"), out: cudaType(weights?.to.dtype ?? operandOf(spec, "r").dtype) },
  });
  const launch = (step: string, grid: GeneratedLaunch["grid"], args: readonly KernelArg[]) => ({
    entry: `${spec.name}_${step}`,
    grid,
    threads: 256,
    shared: 0,
    args,
  });
  const outputs = [
    rowIndex,
    ...(spec.mayOverflow ? [neededRows] : []),
    ...(weights ? [weights.from.name, weights.to.name] : []),
    ...(map ? [scratchStart] : []),
  ];
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

/** Writes the map from (token, expert) to its row, or −1. */
function mapRows(spec: RowsSpec): RowsKernelPart {
  const { tokens, sequence, experts } = sizesOf(spec);
  const launch = (step: string, items: number, args: readonly KernelArg[]) => ({
    ...{ entry: `${spec.name}_${step}`, grid: oneDim(items, 256), threads: 256, shared: 0, args },
  });
  return {
    body: render("cuda/map_rows.cu", { name: spec.name, cells: tokens * experts, sequence, experts }),
    scratch: mapBytes(spec),
    launches: [launch("none", tokens * experts, [scratchStart]), launch("map", spec.bound, [rowIndex, scratchStart, ...starts])],
  };
}

/** Copies the vector of each token to its rows. */
function broadcastRows(spec: CopySpec): RowsKernelPart {
  invariant(spec.dtype.x === spec.dtype.r, "permute copies between operands of different types");
  const { shares, ...how } = perToken(spec, 4);
  return {
    body: render("cuda/broadcast.cu", { name: spec.name, ...shares, ...how, type: cudaType(spec.dtype.x) }),
    launches: [tokenLaunch(spec, shares, [scratchStart, "x", "r"])],
  };
}

/** Sums the rows of each token, and adds its vector of `addend`. */
function reducePartials(spec: CopySpec, addend?: KernelOperand): RowsKernelPart {
  const { shares, ...how } = perToken(spec, 2);
  return {
    body: render("cuda/reduce_partials.cu", {
      name: spec.name,
      ...shares,
      ...how,
      ...{ deep: 4, addend: addend ? cudaType(addend.dtype) : "" },
      type: cudaType(spec.dtype.r),
      out: cudaType(spec.dtype.x),
    }),
    launches: [tokenLaunch(spec, shares, [scratchStart, "r", ...(addend ? [addend.name] : []), "x"])],
  };
}

/** Divides the vector of a token among whole warps, which find the experts of the token by ballots. */
function perToken(spec: CopySpec, most: number) {
  const width = spec.d.D;
  const { tokens, experts } = sizesOf(spec);
  const shares = shareRow(width, vectorOf(width, [spec.dtype.x, spec.dtype.r]), most);
  const lanes = Math.max(32, shares.lanes);
  return { shares: { ...shares, lanes }, width, tokens, experts };
}
const tokenLaunch = (
  spec: RowsSpec,
  { threads, lanes }: { threads: number; lanes: number },
  args: readonly KernelArg[],
): GeneratedLaunch => ({
  ...{ entry: spec.name, grid: oneDim(sizesOf(spec).tokens, threads / lanes), threads, shared: 0, args },
});

/** Copies `width` values per row: `target` and `origin` are indices, each `row` or `cell`, the index of its (token, expert). */
export function perRow(
  spec: RowsSpec,
  {
    from,
    to,
    ...values
  }: {
    readonly what: string;
    readonly from: KernelOperand;
    readonly to: KernelOperand;
    readonly target: "row" | "cell";
    readonly origin: "row" | "cell";
  },
  width = 1,
): RowsKernelPart {
  const { sequence, experts } = sizesOf(spec);
  const types = { from: cudaType(from.dtype), to: cudaType(to.dtype) };
  return {
    body: render("cuda/pack.cu", { name: spec.name, ...values, ...types, sequence, experts, width, wide: width > 1 }),
    launches: [
      { entry: spec.name, grid: oneDim(spec.bound * width, 256), threads: 256, shared: 0, args: [rowIndex, from.name, to.name, ...starts] },
    ],
  };
}
