import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import * as ops from "../../ops/balance.ts";
import { invariant } from "../../ops/op.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec, operandOf, type SpecOf } from "../kernelSpec.ts";
import { type KernelArg, scratch, scratchStart } from "../launchArgs.ts";
import { quantileSelection, thresholdOf } from "../selection.ts";
import { sumColumns } from "./reduce.ts";
import { bestExperts, bestTokens } from "./router.ts";
import { f32, source } from "./text.ts";

/** CUDA kernels of load balancing. */
export const balance = {
  expert_counts: cudaKernel(ops.expertCounts, (spec) => count(spec, { batches: spec.d.A, tokens: spec.d.P * spec.d.S })),
  expert_load: cudaKernel(ops.expertLoad, (spec) => count(spec, { batches: 1, tokens: spec.d.B * spec.d.S })),
  expert_loads: cudaKernel(ops.expertLoads, (spec) => count(spec, { batches: 1, tokens: spec.d.B * spec.d.S }, "row")),
  running_mean: cudaKernel(ops.runningMean, (spec) =>
    oneBlock(spec, ["n", "mean", "total"], (v) => render("cuda/running_mean.cu", { ...v, choices: f32(spec.d.choices) })),
  ),
  bias_update: cudaKernel(ops.biasUpdate, (spec) =>
    oneBlock(spec, ["n", "scale", "bias"], (v) => render("cuda/bias_update.cu", { ...v, rate: f32(spec.d.rate) })),
  ),
  quantile_update: cudaKernel(ops.quantileUpdate, (spec) =>
    oneBlock(spec, ["n", "scale", "bias"], (v) =>
      render("cuda/quantile_update.cu", { ...v, ema: f32(spec.d.ema), rest: f32(1 - spec.d.ema) }),
    ),
  ),
  sinkhorn: cudaKernel(ops.sinkhorn, sinkhorn),
  quantile: cudaKernel(ops.quantile, quantile),
};

/** Counts the tokens of each batch that chose each expert; with `row`, into the row of `n` that this attribute holds. */
function count(
  spec: KernelSpec<"c" | "n", "E">,
  { batches, tokens }: { readonly batches: number; readonly tokens: number },
  row?: string,
): GeneratedKernel {
  const { E } = spec.d;
  invariant(E <= 1024, `a block cannot count ${E} experts`);
  const threads = E > 256 ? 1024 : 256;
  const active = Math.floor(threads / E) * E;
  // about 32 elements per thread
  const each = 32 * (active / E);
  const chunks = Math.ceil(tokens / each);
  const body = render("cuda/expert_counts.cu", {
    ...{ name: spec.name, threads, active, tokens: each, experts: E, batch: tokens * E, batches },
  });
  const sum = sumColumns(spec, { rows: chunks, width: batches * E, to: operandOf(spec, "n"), ...(row && { row }) });
  return {
    source: source(spec, `${body}\n${sum.body}`),
    scratch: chunks * batches * E * bytesOf.f32,
    launches: [{ entry: spec.name, grid: [chunks, batches, 1], threads, shared: 0, args: ["c", scratchStart] }, sum.launch],
  };
}

/** A kernel of one block: there are few values per expert. */
function oneBlock(
  spec: KernelSpec<string, "E">,
  args: readonly KernelArg[],
  body: (values: { name: string; threads: number; experts: number }) => string,
): GeneratedKernel {
  const threads = 1024;
  return {
    source: source(spec, body({ name: spec.name, threads, experts: spec.d.E })),
    launches: [{ entry: spec.name, grid: [1, 1, 1], threads, shared: 0, args }],
  };
}

/** Largest number of experts per lane: each needs three registers. */
const MOST_ITEMS = 40;

/** One block iterates per microbatch until convergence: a rank processes one microbatch at a time, and no block may wait for another. */
function sinkhorn(spec: SpecOf<typeof ops.sinkhorn>): GeneratedKernel {
  const { A, P, S, E, most } = spec.d;
  const items = Math.ceil(E / 32);
  invariant(items <= MOST_ITEMS, `a warp cannot balance ${E} experts`);
  // 65536 registers for all threads
  const threads = items <= 8 ? 1024 : items <= 16 ? 512 : 256;
  const tokens = P * S;
  const words = tokens + E + (threads / 32) * E;
  const body = render("cuda/sinkhorn.cu", {
    ...{ name: spec.name, threads, experts: E, items, tokens, words, most: most, x: cudaType(spec.dtype.x) },
    ...{ perToken: f32(1 / tokens), perExpert: f32(1 / E) },
  });
  return {
    source: source(spec, body),
    scratch: A * words * bytesOf.f32,
    launches: [{ entry: spec.name, grid: [A, 1, 1], threads, shared: 0, args: ["x", "y", "rounds", scratchStart] }],
  };
}

/** Threshold of each token, quantile of the surpluses of each expert, and their mean (src/ops/balance.ts). */
function quantile(spec: SpecOf<typeof ops.quantile>): GeneratedKernel {
  const { A, P, S, E, count: microbatches } = spec.d;
  const tokens = P * S;
  const surpluses = Math.ceil((A * tokens * bytesOf.f32) / 256) * 256;
  const least = bestExperts(`${spec.name}_least`, thresholdOf(spec), scratchStart);
  const select = bestTokens(`${spec.name}_select`, quantileSelection(spec), {
    params: `const ${cudaType(spec.dtype.x)}* x, const float* least, float* quantiles`,
    args: ["x", scratchStart, scratch(surpluses)],
    // bits of floats in integer order: those of negative floats are inverted
    key: "const u32 bits = __float_as_uint(widen(x[at]) - least[token]); return bits ^ (u32(int(bits) >> 31) | 0x80000000u);",
    last: `quantiles[group * EXPERTS + e] = __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key) * ${f32(1 / microbatches)};`,
  });
  const sum = sumColumns(spec, { rows: A, width: E, to: operandOf(spec, "q") });
  return {
    source: source(spec, [least.body, select.body, sum.body].join("\n")),
    scratch: surpluses + A * E * bytesOf.f32,
    launches: [least.launch, select.launch, { ...sum.launch, args: [scratch(surpluses), "q"] }],
  };
}
