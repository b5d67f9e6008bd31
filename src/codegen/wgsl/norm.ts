/** Root-mean-square norms over the model's width or each head: rows side by side in a workgroup, as many as fit. And sums down columns. */
import { render } from "../../../templates/bindings.ts";
import type { Made, Use } from "../kernelSpec.ts";
import { columnSum, THREADS, totalOver } from "./reduce.ts";
import { type Entry, float, fold, horizontal, kernel, lanesOf, scalar, scratchBytes, vector, widthOf } from "./text.ts";

/** How rows of `width` elements lie over workgroups. */
function rowsOver(use: Use, width: number) {
  const rows = use.size.x! / width;
  const wide = widthOf(width);
  const vectors = width / wide;
  const lanes = lanesOf(vectors, THREADS);
  const perGroup = THREADS / lanes;
  const groups = Math.ceil(rows / perGroup);
  const type = (name: string) => vector(scalar(use.dtype[name]!), wide);
  const values = {
    ...{ entry: use.name, threads: THREADS, lanes, width: float(width), vectors, perGroup, rows },
    ...{ index: fold(groups).index, eps: float(use.d.eps!), vector: vector("f32", wide) },
  };
  return { rows, wide, lanes, groups, type, values };
}

function norm(use: Use, width: number): Made {
  const { wide, lanes, groups, type, values } = rowsOver(use, width);
  const buffers = ["x", "gain", "y"].map((arg) => ({ arg, type: type(arg) }));
  const text = render("wgsl/rmsnorm.wgsl", { ...values, sum: horizontal("squares", wide), type: type("y") });
  return kernel(use, [{ entry: use.name, grid: groups, threads: THREADS, buffers }], [totalOver(lanes), text]);
}

/** A launch over rows for dx, which leaves each row's scale in scratch, then two for dgain: Σ x·r·dy down the columns. */
function normGrad(use: Use, width: number): Made {
  const { rows, wide, lanes, groups, type, values } = rowsOver(use, width);
  const overRows: Entry = {
    ...{ entry: use.name, grid: groups, threads: THREADS },
    buffers: [
      { arg: "x", name: "x_row", type: type("x") },
      { arg: "gain", type: type("gain") },
      { arg: "dy", name: "dy_row", type: type("dy") },
      { arg: "dx", type: type("dx") },
      { arg: "scratch+0", name: "scales", type: "f32" },
    ],
  };
  const gain = columnSum(use, {
    ...{ out: "dgain", batches: 1, rows, width, first: rows },
    buffers: ["x", "dy"].map((arg) => ({ arg, type: scalar(use.dtype[arg]!) })),
    term: "f32(x[at]) * sums[row] * f32(dy[at])",
  });
  const text = render("wgsl/rmsnorm_grad.wgsl", {
    ...values,
    ...{ squares: horizontal("squares", wide), products: horizontal("products", wide), type: type("dx") },
  });
  return kernel(use, [overRows, ...gain.entries], [totalOver(lanes, { type: "vec2<f32>" }), text, gain.text], scratchBytes(gain.words));
}

function biasGrad(use: Use): Made {
  const width = use.d.N!;
  const sum = columnSum(use, {
    ...{ out: "dbias", batches: 1, rows: use.size.dy! / width, width, first: 0 },
    buffers: [{ arg: "dy", type: scalar(use.dtype.dy!) }],
    term: "f32(dy[at])",
  });
  return kernel(use, sum.entries, [sum.text], scratchBytes(sum.words));
}

export const norms = {
  rmsnorm: (use: Use): Made => norm(use, use.d.D!),
  rmsnorm_grad: (use: Use): Made => normGrad(use, use.d.D!),
  head_norm: (use: Use): Made => norm(use, use.d.C!),
  head_norm_grad: (use: Use): Made => normGrad(use, use.d.C!),
  bias_grad: biasGrad,
};
