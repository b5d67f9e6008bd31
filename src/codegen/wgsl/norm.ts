/** Root-mean-square norms over the width of the model or of each head, with several rows per workgroup; and the gradient of a bias. */
import { render } from "../../../templates/bindings.ts";
import { biasGrad } from "../../ops/linear.ts";
import { headNorm, headNormGrad, rmsnorm, rmsnormGrad } from "../../ops/norm.ts";
import { type GeneratedKernel, type KernelSpec, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { columnSum, THREADS, totalOver } from "./reduce.ts";
import { bindingOf, type EntryPoint, float, foldGrid, horizontal, kernel, lanesOf, scalar, scratchBytes, vector, widthOf } from "./text.ts";

type NormSpec = KernelSpec<"x" | "gain" | "y", "eps">;
type NormGradSpec = KernelSpec<"x" | "gain" | "dy" | "dx" | "dgain", "eps">;

/** Divides rows of `width` elements among workgroups. */
function rowsOver(spec: KernelSpec<"x", "eps">, width: number) {
  const rows = spec.size.x / width;
  const wide = widthOf(width);
  const vectors = width / wide;
  const lanes = lanesOf(vectors, THREADS);
  const perGroup = THREADS / lanes;
  const groups = Math.ceil(rows / perGroup);
  const values = {
    ...{ entry: spec.name, threads: THREADS, lanes, width: float(width), vectors, perGroup, rows },
    ...{ index: foldGrid(groups).index, eps: float(spec.d.eps), vector: vector("f32", wide) },
  };
  return { rows, wide, lanes, groups, values };
}

function normalize(spec: NormSpec, width: number): GeneratedKernel {
  const { wide, lanes, groups, values } = rowsOver(spec, width);
  const buffers = (["x", "gain", "y"] as const).map((name) => bindingOf(operandOf(spec, name), wide));
  const type = vector(scalar(spec.dtype.y), wide);
  const text = render("wgsl/rmsnorm.wgsl", { ...values, sum: horizontal("squares", wide), type });
  return kernel(spec, [{ entry: spec.name, grid: groups, threads: THREADS, buffers }], [totalOver(lanes), text]);
}

/** One launch over rows computes dx and writes the scale of each row to scratch; two launches sum dgain = Σ x·r·dy over the rows. */
function normalizeGrad(spec: NormGradSpec, width: number): GeneratedKernel {
  const { rows, wide, lanes, groups, values } = rowsOver(spec, width);
  const overRows: EntryPoint = {
    ...{ entry: spec.name, grid: groups, threads: THREADS },
    buffers: [
      bindingOf(operandOf(spec, "x"), wide, "x_row"),
      bindingOf(operandOf(spec, "gain"), wide),
      bindingOf(operandOf(spec, "dy"), wide, "dy_row"),
      bindingOf(operandOf(spec, "dx"), wide),
      { arg: scratchStart, name: "scales", type: "f32" },
    ],
  };
  const gain = columnSum(spec, {
    ...{ out: "dgain", batches: 1, rows, width, first: rows },
    buffers: (["x", "dy"] as const).map((name) => bindingOf(operandOf(spec, name))),
    term: "f32(x[at]) * sums[row] * f32(dy[at])",
  });
  const text = render("wgsl/rmsnorm_grad.wgsl", {
    ...values,
    ...{ squares: horizontal("squares", wide), products: horizontal("products", wide), type: vector(scalar(spec.dtype.dx), wide) },
  });
  return kernel(spec, [overRows, ...gain.entries], [totalOver(lanes, { type: "vec2<f32>" }), text, gain.text], scratchBytes(gain.words));
}

function sumTokens(spec: SpecOf<typeof biasGrad>): GeneratedKernel {
  const width = spec.d.N;
  const sum = columnSum(spec, {
    ...{ out: "dbias", batches: 1, rows: spec.size.dy / width, width, first: 0 },
    ...{ buffers: [bindingOf(operandOf(spec, "dy"))], term: "f32(dy[at])" },
  });
  return kernel(spec, sum.entries, [sum.text], scratchBytes(sum.words));
}

/** WGSL kernels of norms. */
export const norm = {
  rmsnorm: wgslKernel(rmsnorm, (spec) => normalize(spec, spec.d.D)),
  rmsnorm_grad: wgslKernel(rmsnormGrad, (spec) => normalizeGrad(spec, spec.d.D)),
  head_norm: wgslKernel(headNorm, (spec) => normalize(spec, spec.d.C)),
  head_norm_grad: wgslKernel(headNormGrad, (spec) => normalizeGrad(spec, spec.d.C)),
  bias_grad: wgslKernel(biasGrad, sumTokens),
};
