/** The router's scores and weights, an invocation per token, and its losses: sums over all tokens in a fixed order. */
import { render } from "../../../templates/bindings.ts";
import type { Made, Use } from "../kernelSpec.ts";
import { scalarSum, THREADS } from "./reduce.ts";
import { type Entry, float, fold, kernel, scalar } from "./text.ts";

/** An entry with an invocation per token on these operands, and what its template needs. */
function perToken(use: Use, tokens: number, names: readonly string[]) {
  const groups = Math.ceil(tokens / THREADS);
  const buffers = names.map((arg) => ({ arg, type: scalar(use.dtype[arg]!) }));
  const entry: Entry = { entry: use.name, grid: groups, threads: THREADS, buffers };
  return { entry, values: { entry: use.name, threads: THREADS, index: fold(groups).index, tokens, experts: use.d.E! } };
}
const tokensOf = (use: Use, name: string): number => use.size[name]! / use.d.E!;
const logSumExp = (use: Use): string => render("wgsl/log_sum_exp.wgsl", { experts: use.d.E! });

function softmax(use: Use): Made {
  const { entry, values } = perToken(use, tokensOf(use, "x"), ["x", "y"]);
  const text = render("wgsl/softmax.wgsl", { ...values, out: "y", type: scalar(use.dtype.y!), value: "exp(f32(x[e]) - log_sum)" });
  return kernel(use, [entry], [logSumExp(use), text]);
}
function zLossGrad(use: Use): Made {
  const { entry, values } = perToken(use, tokensOf(use, "x"), ["x", "dy", "dx"]);
  const value = `${float(2 * use.d.c!)} * dy[0] * log_sum * exp(f32(x[e]) - log_sum)`;
  const text = render("wgsl/softmax.wgsl", { ...values, out: "dx", type: scalar(use.dtype.dx!), value });
  return kernel(use, [entry], [logSumExp(use), text]);
}
function softmaxGrad(use: Use): Made {
  const { entry, values } = perToken(use, tokensOf(use, "y"), ["y", "dy", "dx"]);
  return kernel(use, [entry], [render("wgsl/softmax_grad.wgsl", { ...values, type: scalar(use.dtype.dx!) })]);
}

function normalize(use: Use): Made {
  const { entry, values } = perToken(use, tokensOf(use, "p"), ["p", "y"]);
  const text = { ...values, op: use.op, sum: "p[e]", dot: "", out: "y", value: "p[e] / (sum + 1e-20)" };
  return kernel(use, [entry], [render("wgsl/weigh.wgsl", text)]);
}
function normalizeGrad(use: Use): Made {
  const { entry, values } = perToken(use, tokensOf(use, "p"), ["p", "dy", "dp"]);
  const text = {
    ...values,
    op: use.op,
    sum: "p[e]",
    dot: "p[e] * dy[e]",
    out: "dp",
    value: "(dy[e] - dot / (sum + 1e-20)) / (sum + 1e-20)",
  };
  return kernel(use, [entry], [render("wgsl/weigh.wgsl", text)]);
}
function weigh(use: Use): Made {
  const { normalize, scale } = use.d;
  const { entry, values } = perToken(use, tokensOf(use, "p"), ["p", "c", "y"]);
  const value = normalize ? `c[e] * p[e] * (${float(scale!)} / (sum + 1e-20))` : `c[e] * p[e] * ${float(scale!)}`;
  return kernel(
    use,
    [entry],
    [render("wgsl/weigh.wgsl", { ...values, op: use.op, sum: normalize ? "c[e] * p[e]" : "", dot: "", out: "y", value })],
  );
}
function weighGrad(use: Use): Made {
  const { normalize, scale } = use.d;
  const { entry, values } = perToken(use, tokensOf(use, "p"), normalize ? ["p", "c", "dy", "dp"] : ["c", "dy", "dp"]);
  const text = normalize
    ? {
        sum: "c[e] * p[e]",
        dot: "c[e] * p[e] * dy[e]",
        value: `c[e] * (dy[e] - dot / (sum + 1e-20)) * (${float(scale!)} / (sum + 1e-20))`,
      }
    : { sum: "", dot: "", value: `c[e] * dy[e] * ${float(scale!)}` };
  return kernel(use, [entry], [render("wgsl/weigh.wgsl", { ...values, op: use.op, ...text, out: "dp" })]);
}

/** With counts for every `batch` elements of p. */
const auxLoss = (use: Use, batch: number): Made =>
  scalarSum(use, {
    buffers: ["p", "n"].map((arg) => ({ arg, type: "f32" })),
    count: use.size.p!,
    term: `p[i] * n[i / ${batch}u * ${use.d.E}u + i % ${use.d.E}u]`,
    factor: float(use.d.c!),
  });
const zLoss = (use: Use): Made =>
  scalarSum(use, {
    ...{ buffers: [{ arg: "x", type: scalar(use.dtype.x!) }], count: tokensOf(use, "x"), functions: [logSumExp(use)] },
    ...{ lines: ["let log_sum = logSumExp(i);"], term: "log_sum * log_sum", factor: float(use.d.c!) },
  });

export const router = {
  ...{ softmax, softmax_grad: softmaxGrad, normalize, normalize_grad: normalizeGrad, z_loss: zLoss, z_loss_grad: zLossGrad },
  aux_loss: (use: Use): Made => auxLoss(use, use.d.P! * use.d.S! * use.d.E!),
  global_aux_loss: (use: Use): Made => auxLoss(use, use.size.p!),
  ...{ weigh, weigh_grad: weighGrad },
};
