/** Root-mean-square norms in one pass over memory, with a row in the registers of the threads of one block; and the gradient of a bias. */
import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { rmsnormGradAdd } from "../../ops/fused.ts";
import { biasGrad } from "../../ops/linear.ts";
import { headNorm, headNormGrad, rmsnorm, rmsnormGrad } from "../../ops/norm.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec, operandOf, type SpecOf } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { sumColumns } from "./reduce.ts";
import { f32, shareRow, source, vectorOf } from "./text.ts";

/** CUDA kernels of norms. */
export const norm = {
  rmsnorm: cudaKernel(rmsnorm, (spec) => normalize(spec, spec.d.D)),
  head_norm: cudaKernel(headNorm, (spec) => normalize(spec, spec.d.C)),
  rmsnorm_grad: cudaKernel(rmsnormGrad, (spec, arch) => normalizeGrad(spec, spec.d.D, arch)),
  rmsnorm_grad_add: cudaKernel(rmsnormGradAdd, (spec, arch) => normalizeGrad(spec, spec.d.D, arch, "z")),
  head_norm_grad: cudaKernel(headNormGrad, (spec, arch) => normalizeGrad(spec, spec.d.C, arch)),
  bias_grad: cudaKernel(biasGrad, sumTokens),
};

function normalize(spec: KernelSpec<"x" | "gain" | "y", "eps">, width: number): GeneratedKernel {
  const { x, gain, y } = spec.dtype;
  const rows = spec.size.x / width;
  const shares = shareRow(width, vectorOf(width, [x, gain, y]), 4);
  const body = render("cuda/norm.cu", {
    ...{ name: spec.name, ...shares, width, rows, inverse: f32(1 / width), eps: f32(spec.d.eps) },
    ...{ x: cudaType(x), gain: cudaType(gain), y: cudaType(y) },
  });
  const grid: [number, number, number] = [Math.ceil(rows / (shares.threads / shares.lanes)), 1, 1];
  return {
    source: source(spec, body),
    launches: [{ entry: spec.name, grid, threads: shares.threads, shared: 0, args: ["x", "gain", "y"] }],
  };
}

function normalizeGrad(
  spec: KernelSpec<"x" | "gain" | "dy" | "dx" | "dgain", "eps">,
  width: number,
  arch: Arch,
  addend?: "z",
): GeneratedKernel {
  const { x, gain, dy, dx } = spec.dtype;
  const rows = spec.size.x / width;
  const shares = shareRow(width, vectorOf(width, [x, gain, dy, dx]), 2);
  const groups = shares.threads / shares.lanes;
  // 1024 threads of 64 registers fill a multiprocessor: the launch bound of the kernel, and one wave of blocks. For Blackwell the compiler
  // needs more registers where a thread has 16 values of a row
  const together = arch === "sm_100a" && shares.vector * shares.items >= 16 ? 512 : 1024;
  const resident = Math.max(1, together / shares.threads);
  const blocks = Math.min(Math.ceil(rows / groups), cudaArchs[arch].multiprocessors * resident);
  const body = render("cuda/norm_grad.cu", {
    ...{ name: spec.name, ...shares, resident, width, rows, grid: blocks, inverse: f32(1 / width), eps: f32(spec.d.eps) },
    ...{ x: cudaType(x), gain: cudaType(gain), dy: cudaType(dy), dx: cudaType(dx), adds: addend !== undefined },
  });
  const sum = sumColumns(spec, { rows: blocks, width, to: operandOf(spec, "dgain") });
  return {
    source: source(spec, `${body}\n${sum.body}`),
    scratch: blocks * width * bytesOf.f32,
    launches: [
      {
        entry: spec.name,
        grid: [blocks, 1, 1],
        threads: shares.threads,
        shared: 0,
        args: ["x", "gain", "dy", ...(addend ? [addend] : []), "dx", scratchStart],
      },
      sum.launch,
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
