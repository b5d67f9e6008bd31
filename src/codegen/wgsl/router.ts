/** The router's scores and weights, an invocation per token, and its losses: sums over all tokens in a fixed order. */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { scalarSum, THREADS } from "./reduce.ts";
import { type EntryPoint, float, foldGrid, kernel, scalar } from "./text.ts";

/** An entry with an invocation per token on these operands, and what its template needs. */
function perToken(spec: KernelSpec, tokens: number, names: readonly string[]) {
  const groups = Math.ceil(tokens / THREADS);
  const buffers = names.map((arg) => ({ arg, type: scalar(spec.dtype[arg]!) }));
  const entry: EntryPoint = { entry: spec.name, grid: groups, threads: THREADS, buffers };
  return { entry, values: { entry: spec.name, threads: THREADS, index: foldGrid(groups).index, tokens, experts: spec.d.E! } };
}
const tokensOf = (spec: KernelSpec, name: string): number => spec.size[name]! / spec.d.E!;
const logSumExp = (spec: KernelSpec): string => render("wgsl/log_sum_exp.wgsl", { experts: spec.d.E! });

function softmax(spec: KernelSpec): GeneratedKernel {
  const { entry, values } = perToken(spec, tokensOf(spec, "x"), ["x", "y"]);
  const text = render("wgsl/softmax.wgsl", { ...values, out: "y", type: scalar(spec.dtype.y!), value: "exp(f32(x[e]) - log_sum)" });
  return kernel(spec, [entry], [logSumExp(spec), text]);
}
function zLossGrad(spec: KernelSpec): GeneratedKernel {
  const { entry, values } = perToken(spec, tokensOf(spec, "x"), ["x", "dy", "dx"]);
  const value = `${float(2 * spec.d.c!)} * dy[0] * log_sum * exp(f32(x[e]) - log_sum)`;
  const text = render("wgsl/softmax.wgsl", { ...values, out: "dx", type: scalar(spec.dtype.dx!), value });
  return kernel(spec, [entry], [logSumExp(spec), text]);
}
function softmaxGrad(spec: KernelSpec): GeneratedKernel {
  const { entry, values } = perToken(spec, tokensOf(spec, "y"), ["y", "dy", "dx"]);
  return kernel(spec, [entry], [render("wgsl/softmax_grad.wgsl", { ...values, type: scalar(spec.dtype.dx!) })]);
}

function normalize(spec: KernelSpec): GeneratedKernel {
  const { entry, values } = perToken(spec, tokensOf(spec, "p"), ["p", "y"]);
  const text = { ...values, op: spec.op, sum: "p[e]", dot: "", out: "y", value: "p[e] / (sum + 1e-20)" };
  return kernel(spec, [entry], [render("wgsl/combine_weights.wgsl", text)]);
}
function normalizeGrad(spec: KernelSpec): GeneratedKernel {
  const { entry, values } = perToken(spec, tokensOf(spec, "p"), ["p", "dy", "dp"]);
  const text = {
    ...values,
    op: spec.op,
    sum: "p[e]",
    dot: "p[e] * dy[e]",
    out: "dp",
    value: "(dy[e] - dot / (sum + 1e-20)) / (sum + 1e-20)",
  };
  return kernel(spec, [entry], [render("wgsl/combine_weights.wgsl", text)]);
}
function combineWeights(spec: KernelSpec): GeneratedKernel {
  const { normalize, scale } = spec.d;
  const { entry, values } = perToken(spec, tokensOf(spec, "p"), ["p", "c", "y"]);
  const value = normalize ? `c[e] * p[e] * (${float(scale!)} / (sum + 1e-20))` : `c[e] * p[e] * ${float(scale!)}`;
  return kernel(
    spec,
    [entry],
    [render("wgsl/combine_weights.wgsl", { ...values, op: spec.op, sum: normalize ? "c[e] * p[e]" : "", dot: "", out: "y", value })],
  );
}
function combineWeightsGrad(spec: KernelSpec): GeneratedKernel {
  const { normalize, scale } = spec.d;
  const { entry, values } = perToken(spec, tokensOf(spec, "p"), normalize ? ["p", "c", "dy", "dp"] : ["c", "dy", "dp"]);
  const text = normalize
    ? {
        sum: "c[e] * p[e]",
        dot: "c[e] * p[e] * dy[e]",
        value: `c[e] * (dy[e] - dot / (sum + 1e-20)) * (${float(scale!)} / (sum + 1e-20))`,
      }
    : { sum: "", dot: "", value: `c[e] * dy[e] * ${float(scale!)}` };
  return kernel(spec, [entry], [render("wgsl/combine_weights.wgsl", { ...values, op: spec.op, ...text, out: "dp" })]);
}

/** With counts for every `batch` elements of p. */
const auxLoss = (spec: KernelSpec, batch: number): GeneratedKernel =>
  scalarSum(spec, {
    buffers: ["p", "n"].map((arg) => ({ arg, type: "f32" })),
    count: spec.size.p!,
    term: `p[i] * n[i / ${batch}u * ${spec.d.E}u + i % ${spec.d.E}u]`,
    factor: float(spec.d.c!),
  });
const zLoss = (spec: KernelSpec): GeneratedKernel =>
  scalarSum(spec, {
    ...{ buffers: [{ arg: "x", type: scalar(spec.dtype.x!) }], count: tokensOf(spec, "x"), functions: [logSumExp(spec)] },
    ...{ lines: ["let log_sum = logSumExp(i);"], term: "log_sum * log_sum", factor: float(spec.d.c!) },
  });

export const router = {
  ...{ softmax, softmax_grad: softmaxGrad, normalize, normalize_grad: normalizeGrad, z_loss: zLoss, z_loss_grad: zLossGrad },
  aux_loss: (spec: KernelSpec): GeneratedKernel => auxLoss(spec, spec.d.P! * spec.d.S! * spec.d.E!),
  global_aux_loss: (spec: KernelSpec): GeneratedKernel => auxLoss(spec, spec.size.p!),
  ...{ combine_weights: combineWeights, combine_weights_grad: combineWeightsGrad },
};
