/** Kernels of load balancing: expert counts, balanced assignments (Sinkhorn, quantile), and the updates of expert biases. */
import { render } from "../../../templates/bindings.ts";
import * as ops from "../../ops/balance.ts";
import { type GeneratedKernel, type KernelSpec, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { quantileSelection, thresholdOf } from "../selection.ts";
import { columnSum, THREADS, totalOver } from "./reduce.ts";
import { bestExperts, bestTokens } from "./router.ts";
import { bindingOf, type EntryPoint, float, kernel, scratchBytes } from "./text.ts";

/** Counts the tokens of each batch that chose each expert; with `row`, into the row of `n` that this attribute holds. */
function count(spec: KernelSpec<string, "E">, batches: number, tokens: number, row?: string): GeneratedKernel {
  const counts = columnSum(spec, {
    ...{ out: "n", batches, rows: tokens, width: spec.d.E, first: 0, buffers: [{ arg: "c", type: "f32" }], term: "c[at]" },
    ...(row !== undefined && { row }),
  });
  return kernel(spec, counts.entries, [counts.text], scratchBytes(counts.words));
}

/** A kernel of one workgroup: there are few values per expert. */
function oneGroup(
  spec: KernelSpec<string, "E">,
  args: readonly string[],
  body: (values: { entry: string; threads: number; experts: number }) => string,
): GeneratedKernel {
  const buffers = args.map((arg) => ({ arg, name: `${arg}_buf`, type: "f32" }));
  const entry: EntryPoint = { entry: spec.name, grid: 1, threads: THREADS, buffers };
  return kernel(spec, [entry], [totalOver(THREADS), body({ entry: spec.name, threads: THREADS, experts: spec.d.E })]);
}

/** One workgroup iterates per microbatch until convergence. Scratch: the row factors of the tokens. */
function sinkhorn(spec: SpecOf<typeof ops.sinkhorn>): GeneratedKernel {
  const { A, P, S, E, most } = spec.d;
  const tokens = P * S;
  // few experts: several invocations share a column
  const parts = Math.max(1, Math.floor(THREADS / E));
  const entry: EntryPoint = {
    ...{ entry: spec.name, grid: [A, 1, 1], threads: THREADS },
    buffers: [
      bindingOf(operandOf(spec, "x")),
      { arg: "y", type: "f32" },
      { arg: "rounds", type: "atomic<i32>" },
      { arg: scratchStart, name: "rows", type: "f32" },
    ],
  };
  const text = render("wgsl/sinkhorn.wgsl", {
    ...{ entry: spec.name, threads: THREADS, experts: E, tokens, parts, shares: parts * E, most: most },
    ...{ perToken: float(1 / tokens), perExpert: float(1 / E) },
  });
  return kernel(spec, [entry], [totalOver(THREADS), text], scratchBytes(A * tokens));
}

/** Threshold of each token, quantile of the surpluses of each expert, and their mean (src/ops/balance.ts). */
function quantile(spec: SpecOf<typeof ops.quantile>): GeneratedKernel {
  const { A, P, S, E, count: microbatches } = spec.d;
  const tokens = P * S;
  const first = A * tokens;
  const least = bestExperts({ op: spec.op, name: `${spec.name}_least` }, thresholdOf(spec), { arg: scratchStart, type: "f32" });
  const select = bestTokens({ op: spec.op, name: `${spec.name}_select` }, quantileSelection(spec), {
    buffers: [bindingOf(operandOf(spec, "x")), { arg: scratchStart, name: "numbers", type: "f32" }],
    // bits of floats in integer order: those of negative floats are inverted
    key: "let bits = bitcast<u32>(f32(x[at]) - numbers[token]); return bits ^ (select(0u, 0xffffffffu, bits >> 31u == 1u) | 0x80000000u);",
    last: `numbers[${first}u + column] = bitcast<f32>(select(~key, key ^ 0x80000000u, key >> 31u == 1u));`,
  });
  const sum = columnSum(spec, {
    ...{ out: "q", batches: 1, rows: A, width: E, first: first + A * E, buffers: [] },
    term: `sums[${first}u + at] * ${float(1 / microbatches)}`,
  });
  return kernel(spec, [least.entry, select.entry, ...sum.entries], [least.text, select.text, sum.text], scratchBytes(sum.words));
}

/** WGSL kernels of load balancing. */
export const balance = {
  expert_counts: wgslKernel(ops.expertCounts, (spec) => count(spec, spec.d.A, spec.d.P * spec.d.S)),
  expert_load: wgslKernel(ops.expertLoad, (spec) => count(spec, 1, spec.d.B * spec.d.S)),
  expert_loads: wgslKernel(ops.expertLoads, (spec) => count(spec, 1, spec.d.B * spec.d.S, "row")),
  running_mean: wgslKernel(ops.runningMean, (spec) =>
    oneGroup(spec, ["n", "mean", "total"], (v) => render("wgsl/running_mean.wgsl", { ...v, choices: float(spec.d.choices) })),
  ),
  bias_update: wgslKernel(ops.biasUpdate, (spec) =>
    oneGroup(spec, ["n", "scale", "bias"], (v) => render("wgsl/bias_update.wgsl", { ...v, rate: float(spec.d.rate) })),
  ),
  quantile_update: wgslKernel(ops.quantileUpdate, (spec) =>
    oneGroup(spec, ["n", "scale", "bias"], (v) =>
      render("wgsl/quantile_update.wgsl", { ...v, ema: float(spec.d.ema), rest: float(1 - spec.d.ema) }),
    ),
  ),
  sinkhorn: wgslKernel(ops.sinkhorn, sinkhorn),
  quantile: wgslKernel(ops.quantile, quantile),
};
