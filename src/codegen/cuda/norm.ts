/** Norms in one pass over memory, with a row in the registers of the threads of one block; and the gradients of biases. */
import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { rmsnormGradAdd, rmsnormGradAddPair, rmsnormGradAddTriple, rmsnormSum, rmsnormSumTriple } from "../../ops/fused.ts";
import { biasGrad, biasRowsGrad } from "../../ops/gemm.ts";
import {
  headLayernorm,
  headLayernormGrad,
  headNorm,
  headNormGrad,
  layernorm,
  layernormGrad,
  rmsnorm,
  rmsnormGrad,
} from "../../ops/norm.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec, offsetsAt, operandOf, type SpecOf } from "../kernelSpec.ts";
import { rowIndex, scratchStart } from "../launchArgs.ts";
import { sumColumns } from "./reduce.ts";
import { f32, shareRow, source, vectorOf } from "./text.ts";

/** CUDA kernels of norms. */
export const norm = {
  rmsnorm: cudaKernel(rmsnorm, (spec) => normalize(spec, spec.d.D)),
  head_norm: cudaKernel(headNorm, (spec) => normalize(spec, spec.d.C)),
  rmsnorm_grad: cudaKernel(rmsnormGrad, (spec, arch) => normalizeGrad(spec, spec.d.D, arch)),
  rmsnorm_sum: cudaKernel(rmsnormSum, (spec) => normalize(spec, spec.d.D, ["x1", "x2"])),
  rmsnorm_sum_triple: cudaKernel(rmsnormSumTriple, (spec) => normalize(spec, spec.d.D, ["x1", "x2", "x3"])),
  rmsnorm_grad_add: cudaKernel(rmsnormGradAdd, (spec, arch) => normalizeGrad(spec, spec.d.D, arch, ["dy"], "z")),
  rmsnorm_grad_add_pair: cudaKernel(rmsnormGradAddPair, (spec, arch) => normalizeGrad(spec, spec.d.D, arch, ["dy1", "dy2"], "z")),
  rmsnorm_grad_add_triple: cudaKernel(rmsnormGradAddTriple, (spec, arch) =>
    normalizeGrad(spec, spec.d.D, arch, ["dy1", "dy2", "dy3"], "z"),
  ),
  head_norm_grad: cudaKernel(headNormGrad, (spec, arch) => normalizeGrad(spec, spec.d.C, arch)),
  layernorm: cudaKernel(layernorm, (spec) => normalize(spec, spec.d.D)),
  head_layernorm: cudaKernel(headLayernorm, (spec) => normalize(spec, spec.d.C)),
  layernorm_grad: cudaKernel(layernormGrad, (spec, arch) => normalizeGrad(spec, spec.d.D, arch)),
  head_layernorm_grad: cudaKernel(headLayernormGrad, (spec, arch) => normalizeGrad(spec, spec.d.C, arch)),
  bias_grad: cudaKernel(biasGrad, sumTokens),
  bias_rows_grad: cudaKernel(biasRowsGrad, sumRows),
};

/** Normalizes rows of the sum of some inputs; of several inputs the sum is an output too. */
function normalize<Input extends string = "x">(
  spec: KernelSpec<NoInfer<Input> | "gain" | "y", "eps">,
  width: number,
  [first, ...more]: readonly [Input, ...Input[]] = ["x" as Input],
): GeneratedKernel {
  const { gain, y } = spec.dtype;
  const x = spec.dtype[first];
  const center = "bias" in spec.size;
  const rows = spec.size.y / width;
  const sum = more.length > 0;
  const shares = shareRow(width, vectorOf(width, [x, gain, y]), 4);
  const body = render("cuda/norm.cu", {
    ...{ center, offset: offsetOf(spec), name: spec.name, ...shares, width, rows, inverse: f32(1 / width), eps: f32(spec.d.eps) },
    ...{ more, sum },
    ...{ x: cudaType(x), gain: cudaType(gain), bias: cudaType(center ? operandOf<string>(spec, "bias").dtype : gain), y: cudaType(y) },
  });
  const grid: [number, number, number] = [Math.ceil(rows / (shares.threads / shares.lanes)), 1, 1];
  return {
    source: source(spec, body),
    launches: [
      {
        entry: spec.name,
        grid,
        threads: shares.threads,
        shared: 0,
        args: [first, ...more, "gain", ...(sum ? ["sum"] : []), ...(center ? ["bias"] : []), "y"],
      },
    ],
  };
}

/** The text before a gain: a gain may be stored less 1. */
const offsetOf = ({ d }: KernelSpec<string, "eps">): string => (d.offset ? `${f32(d.offset)} + ` : "");

/** The gradient, where dy is the sum of `slopes`; `addend` is added to dx. */
function normalizeGrad<Slope extends string = "dy">(
  spec: KernelSpec<NoInfer<Slope> | "x" | "gain" | "dx" | "dgain", "eps">,
  width: number,
  arch: Arch,
  [slope, ...more]: readonly [Slope, ...Slope[]] = ["dy" as Slope],
  addend?: "z",
): GeneratedKernel {
  const { x, gain, dx } = spec.dtype;
  const dy = spec.dtype[slope];
  const rows = spec.size.x / width;
  const shares = shareRow(width, vectorOf(width, [x, gain, dy, dx]), 2);
  const center = "dbias" in spec.size;
  const groups = shares.threads / shares.lanes;
  // 1024 threads of 64 registers fill a multiprocessor: the launch bound of the kernel, and one wave of blocks. For Blackwell the compiler
  // needs more registers where a thread has 16 values of a row, and so do several slopes
  const together = (arch === "sm_100a" || more.length > 0) && shares.vector * shares.items >= 16 ? 512 : 1024;
  const resident = Math.max(1, together / shares.threads);
  const blocks = Math.min(Math.ceil(rows / groups), cudaArchs[arch].multiprocessors * resident);
  const body = render("cuda/norm_grad.cu", {
    ...{
      center,
      offset: offsetOf(spec),
      name: spec.name,
      ...shares,
      resident,
      width,
      rows,
      grid: blocks,
      inverse: f32(1 / width),
      eps: f32(spec.d.eps),
    },
    ...{
      x: cudaType(x),
      gain: cudaType(gain),
      dy: cudaType(dy),
      dx: cudaType(dx),
      adds: addend !== undefined,
      more,
      several: more.length > 0,
    },
  });
  const bytes = blocks * width * bytesOf.f32;
  const sums = [
    sumColumns(spec, { rows: blocks, width, to: operandOf(spec, "dgain") }),
    ...(center ? [sumColumns(spec, { rows: blocks, width, to: operandOf<string>(spec, "dbias"), first: bytes })] : []),
  ];
  return {
    source: source(spec, [body, ...sums.map((sum) => sum.body)].join("\n")),
    scratch: sums.length * bytes,
    launches: [
      {
        entry: spec.name,
        grid: [blocks, 1, 1],
        threads: shares.threads,
        shared: 0,
        args: ["x", "gain", slope, ...more, ...(addend ? [addend] : []), "dx", scratchStart],
      },
      ...sums.map((sum) => sum.launch),
    ],
  };
}

/** Sums over tokens: a block has neighbouring columns, and the rows are divided among enough blocks to occupy the device. */
function sumTokens(spec: SpecOf<typeof biasGrad>, arch: Arch): GeneratedKernel {
  const width = spec.d.N;
  const rows = spec.size.dy / width;
  const vector = vectorOf(width, [spec.dtype.dy]);
  const [lanes, strands] = [32, 8];
  const columns = Math.ceil(width / (lanes * vector));
  const blocks = Math.max(1, Math.min(Math.ceil(rows / (4 * strands)), Math.ceil((4 * cudaArchs[arch].multiprocessors) / columns)));
  const depth = Math.ceil(rows / blocks);
  const depths = Math.ceil(rows / depth);
  const body = render("cuda/bias_grad.cu", { name: spec.name, vector, lanes, strands, width, rows, depth, type: cudaType(spec.dtype.dy) });
  const sum = sumColumns(spec, { rows: depths, width, to: operandOf(spec, "dbias") });
  return {
    source: source(spec, `${body}\n${sum.body}`),
    scratch: depths * width * bytesOf.f32,
    launches: [
      { entry: spec.name, grid: [columns, depths, 1], threads: lanes * strands, shared: 0, args: ["dy", scratchStart] },
      sum.launch,
    ],
  };
}

/** Sums over the rows of each expert, which are neighbours. */
function sumRows(spec: SpecOf<typeof biasRowsGrad>): GeneratedKernel {
  const { N: width, E: experts } = spec.d;
  const vector = vectorOf(width, [spec.dtype.dy]);
  const [lanes, strands] = [32, 8];
  const body = render("cuda/bias_rows_grad.cu", {
    ...{ name: spec.name, vector, lanes, strands, width, type: cudaType(spec.dtype.dy) },
    ...{ offsetsAt: offsetsAt(spec.bound), adds: spec.accumulates.has("dbias") },
  });
  const grid: [number, number, number] = [Math.ceil(width / (lanes * vector)), experts, 1];
  return {
    source: source(spec, body),
    launches: [{ entry: spec.name, grid, threads: lanes * strands, shared: 0, args: ["dy", "dbias", rowIndex] }],
  };
}
