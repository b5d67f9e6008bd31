/** Norms over the width of the model or of each head, with several rows per workgroup; and the gradients of biases. */
import { render } from "../../../templates/bindings.ts";
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
import { type GeneratedKernel, type KernelSpec, offsetsAt, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { rowIndex, scratchStart } from "../launchArgs.ts";
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
    // a gain may be stored less 1
    offset: spec.d.offset ? `${float(spec.d.offset)} + ` : "",
  };
  return { rows, wide, lanes, groups, values };
}

function normalize(spec: NormSpec, width: number): GeneratedKernel {
  const { wide, lanes, groups, values } = rowsOver(spec, width);
  const center = "bias" in spec.size;
  const buffers = ["x", "gain", ...(center ? ["bias"] : []), "y"].map((name) => bindingOf(operandOf<string>(spec, name), wide));
  const type = vector(scalar(spec.dtype.y), wide);
  const text = render("wgsl/norm.wgsl", { ...values, center, mean: horizontal("sums", wide), sum: horizontal("squares", wide), type });
  return kernel(spec, [{ entry: spec.name, grid: groups, threads: THREADS, buffers }], [totalOver(lanes), text]);
}

/**
 * One launch over rows computes dx and writes the scale of each row to scratch, of a layer norm also its mean; two launches sum
 * dgain = Σ x·r·dy over the rows, two more dbias = Σ dy.
 */
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
  const center = "dbias" in spec.size;
  const gain = columnSum(spec, {
    ...{ out: "dgain", batches: 1, rows, width, first: center ? 2 * rows : rows },
    buffers: (["x", "dy"] as const).map((name) => bindingOf(operandOf(spec, name))),
    term: `${center ? `(f32(x[at]) - sums[${rows}u + row])` : "f32(x[at])"} * sums[row] * f32(dy[at])`,
  });
  const bias = center
    ? [
        columnSum(spec, {
          ...{ out: "dbias", entry: `${spec.name}_bias`, batches: 1, rows, width, first: gain.words },
          ...{ buffers: [bindingOf(operandOf(spec, "dy"))], term: "f32(dy[at])" },
        }),
      ]
    : [];
  const columns = [gain, ...bias];
  const text = render("wgsl/norm_grad.wgsl", {
    ...values,
    ...{ center, mean: horizontal("means", wide), pulls: horizontal("pulls", wide) },
    ...{ squares: horizontal("squares", wide), products: horizontal("products", wide), type: vector(scalar(spec.dtype.dx), wide) },
  });
  return kernel(
    spec,
    [overRows, ...columns.flatMap((sum) => sum.entries)],
    [totalOver(lanes, { type: "vec2<f32>" }), text, ...columns.map((sum) => sum.text)],
    scratchBytes(Math.max(...columns.map((sum) => sum.words))),
  );
}

function sumTokens(spec: SpecOf<typeof biasGrad>): GeneratedKernel {
  const width = spec.d.N;
  const sum = columnSum(spec, {
    ...{ out: "dbias", batches: 1, rows: spec.size.dy / width, width, first: 0 },
    ...{ buffers: [bindingOf(operandOf(spec, "dy"))], term: "f32(dy[at])" },
  });
  return kernel(spec, sum.entries, [sum.text], scratchBytes(sum.words));
}

function sumRows(spec: SpecOf<typeof biasRowsGrad>): GeneratedKernel {
  const count = spec.size.dbias;
  const groups = Math.ceil(count / THREADS);
  const buffers = [bindingOf(operandOf(spec, "dy")), bindingOf(operandOf(spec, "dbias")), { arg: rowIndex, type: "i32" }];
  const text = render("wgsl/bias_rows_grad.wgsl", {
    ...{ entry: spec.name, threads: THREADS, index: foldGrid(groups).index, count, width: spec.d.N },
    ...{ offsetsAt: offsetsAt(spec.bound), adds: spec.accumulates.has("dbias") },
  });
  return kernel(spec, [{ entry: spec.name, grid: groups, threads: THREADS, buffers }], [text]);
}

/** WGSL kernels of norms. */
export const norm = {
  rmsnorm: wgslKernel(rmsnorm, (spec) => normalize(spec, spec.d.D)),
  rmsnorm_grad: wgslKernel(rmsnormGrad, (spec) => normalizeGrad(spec, spec.d.D)),
  head_norm: wgslKernel(headNorm, (spec) => normalize(spec, spec.d.C)),
  head_norm_grad: wgslKernel(headNormGrad, (spec) => normalizeGrad(spec, spec.d.C)),
  layernorm: wgslKernel(layernorm, (spec) => normalize(spec, spec.d.D)),
  layernorm_grad: wgslKernel(layernormGrad, (spec) => normalizeGrad(spec, spec.d.D)),
  head_layernorm: wgslKernel(headLayernorm, (spec) => normalize(spec, spec.d.C)),
  head_layernorm_grad: wgslKernel(headLayernormGrad, (spec) => normalizeGrad(spec, spec.d.C)),
  bias_grad: wgslKernel(biasGrad, sumTokens),
  bias_rows_grad: wgslKernel(biasRowsGrad, sumRows),
};
