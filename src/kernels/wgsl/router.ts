/** The router, an invocation per token, and its balancing losses: sums over all tokens in a fixed order. */
import { render } from "../../../templates/bindings.ts";
import type { Made, Use } from "../kernel.ts";
import { columnSum, scalarSum, THREADS } from "./reduce.ts";
import { type Entry, float, fold, kernel, scalar, scratchBytes } from "./text.ts";

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

function choose(use: Use): Made {
  const { entry, values } = perToken(use, tokensOf(use, "x"), ["x", "c"]);
  return kernel(use, [entry], [render("wgsl/choose.wgsl", { ...values, k: use.d.k!, words: Math.ceil(use.d.E! / 32) })]);
}
function weigh(use: Use): Made {
  const { normalize } = use.d;
  const { entry, values } = perToken(use, tokensOf(use, "p"), ["p", "c", "y"]);
  const text = { ...values, op: use.op, normalize: !!normalize, grad: false, out: "y" };
  return kernel(use, [entry], [render("wgsl/weigh.wgsl", { ...text, value: normalize ? "c[e] * p[e] * share" : "c[e] * p[e]" })]);
}
function weighGrad(use: Use): Made {
  const { normalize } = use.d;
  const { entry, values } = perToken(use, tokensOf(use, "p"), normalize ? ["p", "c", "dy", "dp"] : ["c", "dy", "dp"]);
  const text = { ...values, op: use.op, normalize: !!normalize, grad: !!normalize, out: "dp" };
  return kernel(
    use,
    [entry],
    [render("wgsl/weigh.wgsl", { ...text, value: normalize ? "c[e] * (dy[e] - dot * share) * share" : "c[e] * dy[e]" })],
  );
}

function tally(use: Use): Made {
  const { A, P, S, E } = use.d as Readonly<Record<"A" | "P" | "S" | "E", number>>;
  const counts = columnSum(use, {
    ...{ out: "n", batches: A, rows: P * S, width: E, first: 0, buffers: [{ arg: "c", type: "f32" }] },
    term: "c[at]",
  });
  return kernel(use, counts.entries, [counts.text], scratchBytes(counts.words));
}
const auxLoss = (use: Use): Made =>
  scalarSum(use, {
    buffers: ["p", "n"].map((arg) => ({ arg, type: "f32" })),
    count: use.size.p!,
    term: `p[i] * n[i / ${use.d.P! * use.d.S! * use.d.E!}u * ${use.d.E}u + i % ${use.d.E}u]`,
    factor: float(use.d.c!),
  });
const zLoss = (use: Use): Made =>
  scalarSum(use, {
    ...{ buffers: [{ arg: "x", type: scalar(use.dtype.x!) }], count: tokensOf(use, "x"), functions: [logSumExp(use)] },
    ...{ lines: ["let log_sum = logSumExp(i);"], term: "log_sum * log_sum", factor: float(use.d.c!) },
  });

export const router = {
  ...{ softmax, softmax_grad: softmaxGrad, z_loss: zLoss, z_loss_grad: zLossGrad, tally, aux_loss: auxLoss },
  ...{ choose, weigh, weigh_grad: weighGrad },
};
