/** Kernels of embedding and loss without a formula: the terms of the softmax, and the gradient of the table. */

import { type Arch, cudaArchs } from "../../../schemas/devices.ts";
import { bytesOf, cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { layoutOf, operandIn } from "../../ops/formula.ts";
import { softmaxStatistics } from "../../ops/fused.ts";
import { sumOfIds } from "../../ops/paddedVocab.ts";
import { embedGrad, softmaxTerms, sourceLosses } from "../../ops/vocab.ts";
import { formulaText } from "../formulaText.ts";
import { cudaKernel, type GeneratedKernel, operandOf, type SpecOf } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, scratch, scratchStart, startOf } from "../launchArgs.ts";
import { rowReduction } from "./formula.ts";
import { clearBytes, sumColumns } from "./reduce.ts";
import { cuda, shareRow, source, vectorOf } from "./text.ts";

/** CUDA kernels of embedding and loss. */
export const vocab = {
  softmax_terms: cudaKernel(softmaxTerms, (spec) => {
    const { V } = spec.d;
    const layout = layoutOf(softmaxTerms);
    const s = sumOfIds(operandIn(layout, "x"), operandIn(layout, "m"), spec.d);
    const type = cudaType(spec.dtype.p);
    return rowReduction(spec, layout, formulaText(cuda, { s }), {
      params: [
        { name: "target", type: "const int*" },
        { name: "p", type: `${type}*` },
        { name: "start", type: "int", arg: startOf("V") },
      ],
      statements: [
        "const int v = target[row] - start;",
        `p[row] = narrow<${type}>(v >= 0 && v < ${V} ? widen(xAt[row * ${V} + v]) : 0.0f);`,
      ],
    });
  }),
  softmax_statistics: cudaKernel(softmaxStatistics, (spec) => {
    const { V, ids = V } = spec.d;
    const rows = spec.size.m;
    const unroll = 4;
    const shares = shareRow(V, vectorOf(V, [spec.dtype.x]), 2 * unroll);
    const [lanes, threads] = [Math.min(512, shares.lanes), Math.min(512, shares.threads)];
    const body = render("cuda/softmax_statistics.cu", {
      ...{ name: spec.name, lanes, threads, vector: shares.vector, unroll, width: V, rows, x: cudaType(spec.dtype.x) },
      ...{ ids, ends: ids % shares.vector > 0 },
    });
    const grid: [number, number, number] = [Math.ceil(rows / (threads / lanes)), 1, 1];
    const args = ["x", "target", "m", "s", "p", startOf("V")];
    return { source: source(spec, body), launches: [{ entry: spec.name, grid, threads, shared: 0, args }] };
  }),
  embed_grad: cudaKernel(embedGrad, sumRowsOfIds),
  source_losses: cudaKernel(sourceLosses, sumOfSources),
};

/** Tokens that a block sums for one source. */
const TOKENS_EACH = 2048;

function sumOfSources(spec: SpecOf<typeof sourceLosses>): GeneratedKernel {
  const threads = 256;
  const [tokens, sources] = [spec.size.l, spec.size.y];
  const chunks = Math.ceil(tokens / TOKENS_EACH);
  const type = cudaType(spec.dtype.l);
  const body = render("cuda/source_losses.cu", { name: spec.name, threads, tokens, share: TOKENS_EACH, sources, type });
  const sum = sumColumns(spec, { rows: chunks, width: sources, to: operandOf(spec, "y") });
  return {
    source: source(spec, `${body}\n${sum.body}`),
    scratch: chunks * sources * bytesOf.f32,
    launches: [
      { entry: spec.name, grid: [chunks, sources, 1], threads, shared: 0, args: ["l", "weight", "source", scratchStart] },
      sum.launch,
    ],
  };
}

/** The most tokens of an id in a short list: a lane of a warp holds one each. */
const SHORT = 32;
/** The longer lists that are summed at once. */
const FREQUENT = 64;
/** The thread blocks that write longer lists. */
const WRITERS = 264;
/** Resident warps per multiprocessor of the launch bounds: they leave a thread 80 of the 65,536 registers. */
const RESIDENT_WARPS = 24;
/** Ids whose rows a warp sums. */
const IDS = 4;

function sumRowsOfIds(spec: SpecOf<typeof embedGrad>, arch: Arch): GeneratedKernel {
  const { V, D } = spec.d;
  const tokens = spec.size.ids;
  const adds = spec.accumulates.has("dtable");
  const vector = vectorOf(D, [spec.dtype.dy]);
  const slices = Math.ceil(D / (32 * vector));
  const warps = Math.min(8, slices);
  const resident = Math.min(Math.floor(RESIDENT_WARPS / warps), cudaArchs[arch].blocksPerMultiprocessor);
  const most = Math.max(1, Math.floor(tokens / (SHORT + 1)));
  const [frequent, writers] = [Math.min(FREQUENT, most), Math.min(WRITERS, most)];
  // ids that the last launch visits: a table that is written gets zeros for all others
  const present = adds ? Math.min(V, tokens) : V;
  const body = render("cuda/embed_grad.cu", {
    ...{ name: spec.name, vector, warps, resident, frequent, writers, tokens, vocabulary: V, width: D, adds, present: adds ? present : 1 },
    ...{ dy: cudaType(spec.dtype.dy), dtable: cudaType(spec.dtype.dtable) },
  });
  const counters = (4 + V) * bytesOf.i32;
  const lists = scratch(Math.ceil(counters / 256) * 256);
  const launch = (suffix: string, threads: number, grid: GeneratedLaunch["grid"], args: readonly KernelArg[]): GeneratedLaunch => ({
    ...{ entry: `${spec.name}${suffix}`, grid, threads, shared: 0, args },
  });
  const clear = clearBytes(spec, counters, scratchStart);
  return {
    source: source(spec, [clear.body, body].join("\n")),
    scratch: lists.offset + (V + (adds ? present : 1) + Math.floor(tokens / SHORT) + 1 + 2 * tokens) * bytesOf.i32,
    launches: [
      clear.launch,
      launch("_count", 256, [Math.ceil(tokens / 256), 1, 1], ["ids", scratchStart, lists, startOf("V")]),
      launch("_lists", 256, [Math.ceil(V / 256), 1, 1], [scratchStart, lists]),
      launch("_order", 1024, [Math.ceil(tokens / 1024) + writers, 1, 1], ["ids", scratchStart, lists, startOf("V")]),
      launch(
        "",
        32 * warps,
        [frequent * warps + Math.ceil(present / IDS), Math.ceil(slices / warps), 1],
        ["dy", "dtable", scratchStart, lists],
      ),
    ],
  };
}
