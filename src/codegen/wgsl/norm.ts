/** Root-mean-square norms over the model's width or each head: rows side by side in a workgroup, as many as fit. And sums down columns. */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { columnSum, THREADS, totalOver } from "./reduce.ts";
import { type EntryPoint, float, foldGrid, horizontal, kernel, lanesOf, scalar, scratchBytes, vector, widthOf } from "./text.ts";

/** How rows of `width` elements lie over workgroups. */
function rowsOver(spec: KernelSpec, width: number) {
  const rows = spec.size.x! / width;
  const wide = widthOf(width);
  const vectors = width / wide;
  const lanes = lanesOf(vectors, THREADS);
  const perGroup = THREADS / lanes;
  const groups = Math.ceil(rows / perGroup);
  const type = (name: string) => vector(scalar(spec.dtype[name]!), wide);
  const values = {
    ...{ entry: spec.name, threads: THREADS, lanes, width: float(width), vectors, perGroup, rows },
    ...{ index: foldGrid(groups).index, eps: float(spec.d.eps!), vector: vector("f32", wide) },
  };
  return { rows, wide, lanes, groups, type, values };
}

function norm(spec: KernelSpec, width: number): GeneratedKernel {
  const { wide, lanes, groups, type, values } = rowsOver(spec, width);
  const buffers = ["x", "gain", "y"].map((arg) => ({ arg, type: type(arg) }));
  const text = render("wgsl/rmsnorm.wgsl", { ...values, sum: horizontal("squares", wide), type: type("y") });
  return kernel(spec, [{ entry: spec.name, grid: groups, threads: THREADS, buffers }], [totalOver(lanes), text]);
}

/** A launch over rows for dx, which leaves each row's scale in scratch, then two for dgain: Σ x·r·dy down the columns. */
function normGrad(spec: KernelSpec, width: number): GeneratedKernel {
  const { rows, wide, lanes, groups, type, values } = rowsOver(spec, width);
  const overRows: EntryPoint = {
    ...{ entry: spec.name, grid: groups, threads: THREADS },
    buffers: [
      { arg: "x", name: "x_row", type: type("x") },
      { arg: "gain", type: type("gain") },
      { arg: "dy", name: "dy_row", type: type("dy") },
      { arg: "dx", type: type("dx") },
      { arg: scratchStart, name: "scales", type: "f32" },
    ],
  };
  const gain = columnSum(spec, {
    ...{ out: "dgain", batches: 1, rows, width, first: rows },
    buffers: ["x", "dy"].map((arg) => ({ arg, type: scalar(spec.dtype[arg]!) })),
    term: "f32(x[at]) * sums[row] * f32(dy[at])",
  });
  const text = render("wgsl/rmsnorm_grad.wgsl", {
    ...values,
    ...{ squares: horizontal("squares", wide), products: horizontal("products", wide), type: type("dx") },
  });
  return kernel(spec, [overRows, ...gain.entries], [totalOver(lanes, { type: "vec2<f32>" }), text, gain.text], scratchBytes(gain.words));
}

function biasGrad(spec: KernelSpec): GeneratedKernel {
  const width = spec.d.N!;
  const sum = columnSum(spec, {
    ...{ out: "dbias", batches: 1, rows: spec.size.dy! / width, width, first: 0 },
    buffers: [{ arg: "dy", type: scalar(spec.dtype.dy!) }],
    term: "f32(dy[at])",
  });
  return kernel(spec, sum.entries, [sum.text], scratchBytes(sum.words));
}

export const norms = {
  rmsnorm: (spec: KernelSpec): GeneratedKernel => norm(spec, spec.d.D!),
  rmsnorm_grad: (spec: KernelSpec): GeneratedKernel => normGrad(spec, spec.d.D!),
  head_norm: (spec: KernelSpec): GeneratedKernel => norm(spec, spec.d.C!),
  head_norm_grad: (spec: KernelSpec): GeneratedKernel => normGrad(spec, spec.d.C!),
  bias_grad: biasGrad,
};
