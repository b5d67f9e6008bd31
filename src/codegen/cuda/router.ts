/** Kernels of the masks of the router: the best experts of a token, in the registers of one warp, and the best tokens of an expert, by one block. */

import { cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { drop, expertChoiceMask, uniformMask } from "../../ops/capacity.ts";
import { invariant } from "../../ops/op.ts";
import { topKMask, topKMaskBiased } from "../../ops/router.ts";
import { cudaKernel, type GeneratedKernel, type KernelSpec, operandOf, positionText } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, startOf } from "../launchArgs.ts";
import { capacitySelection, type ExpertSelection, expertChoice, type TokenSelection, topKOf } from "../selection.ts";
import { f32, shareRow, source, vectorOf } from "./text.ts";

interface KernelPart {
  readonly body: string;
  readonly launch: GeneratedLaunch;
}
const made = (spec: KernelSpec, { body, launch }: KernelPart): GeneratedKernel => ({ source: source(spec, body), launches: [launch] });

/** CUDA kernels of the router. */
export const router = {
  top_k_mask: cudaKernel(topKMask, (spec) => made(spec, bestExperts(spec.name, topKOf(spec), "c"))),
  top_k_mask_biased: cudaKernel(topKMaskBiased, (spec) =>
    made(spec, bestExperts(spec.name, topKOf(spec, { operand: operandOf(spec, "bias"), sign: spec.d.sign }), "c")),
  ),
  apply_capacity: cudaKernel(drop, (spec) => {
    const { position, pad } = spec.d;
    return made(
      spec,
      bestTokens(spec.name, capacitySelection(spec), {
        params: position ? "const float* c, float* d" : "const float* p, const float* c, float* d",
        args: position ? ["c", "d"] : ["p", "c", "d"],
        key: position ? "return c[at] > 0.0f;" : "return c[at] > 0.0f ? __float_as_uint(p[at]) + 1 : 0;",
        write: pad ? "d[at] = taken;" : "d[at] = taken && own > 0;",
      }),
    );
  }),
  expert_choice_mask: cudaKernel(expertChoiceMask, (spec) =>
    made(
      spec,
      bestTokens(spec.name, expertChoice(spec), {
        ...{ params: "const float* p, float* c", args: ["p", "c"], key: "return __float_as_uint(p[at]);", write: "c[at] = taken;" },
      }),
    ),
  ),
  uniform_mask: cudaKernel(uniformMask, (spec) => {
    const { B, S, E, k, S0, E0, chunk, ranks } = spec.d;
    const body = render("cuda/uniform_mask.cu", {
      ...{ name: spec.name, cells: B * S * E, positions: S, experts: E, k, allPositions: S0, allExperts: E0 },
      position: positionText("index", chunk, ranks),
    });
    const args = ["c", startOf("B"), startOf("S"), startOf("E")];
    return made(spec, { body, launch: { entry: spec.name, grid: [Math.ceil((B * S * E) / 256), 1, 1], threads: 256, shared: 0, args } });
  }),
};

/** Writes the mask of the best experts of each token, or their least value, to the launch argument `to`. */
export function bestExperts(name: string, s: ExpertSelection, to: KernelArg): KernelPart {
  invariant(s.k <= s.experts, `a token cannot take ${s.k} of ${s.experts} experts`);
  const { bias } = s;
  const values = {
    ...{ name, width: s.experts, rows: s.tokens, k: s.k, x: cudaType(s.x.dtype), threshold: s.threshold },
    ...{ bias: bias !== undefined, sign: f32(bias?.sign ?? 0), grouped: s.groups > 1, groups: s.groups },
    ...{ groupSize: s.groupSize, groupTopK: s.groupTopK, groupScores: s.groupScores },
  };
  const args = [s.x.name, ...(bias ? [bias.operand.name] : []), to];
  const vector = scoresOfLane(s);
  if (vector !== undefined) {
    const body = render("cuda/top_k_warp.cu", { ...values, vector, pairs: sortingNetwork(vector) });
    return { body, launch: { entry: name, grid: [Math.ceil(s.tokens / 8), 1, 1], threads: 256, shared: 0, args } };
  }
  // at most one warp per token, with any number of values per lane
  const { lanes, ...shares } = shareRow(s.experts, vectorOf(s.experts, [s.x.dtype, "f32"]), Number.POSITIVE_INFINITY);
  const body = render("cuda/top_k_mask.cu", { ...values, ...shares, lanes });
  const grid: [number, number, number] = [Math.ceil(s.tokens / (shares.threads / lanes)), 1, 1];
  return { body, launch: { entry: name, grid, threads: shares.threads, shared: 0, args } };
}
/**
 * Returns how many adjacent scores a lane holds if each lane of a warp sorts its own: 32 to 512 experts, as a multiple of them, in groups of whole
 * lanes. Undefined for others.
 */
function scoresOfLane({ experts, groups, groupSize }: ExpertSelection): number | undefined {
  const each = Math.max(1, 2 ** Math.ceil(Math.log2(experts / 32)));
  if (experts < 32 || each > 16 || experts % each !== 0) return undefined;
  const groupLanes = groupSize / each;
  return groups === 1 || (groupLanes >= 1 && groupLanes <= 32 && Number.isInteger(Math.log2(groupLanes))) ? each : undefined;
}

/** Returns the comparisons of Batcher's odd-even merge sort of `count` values, a power of two, as pairs of places. */
function sortingNetwork(count: number): { first: number; second: number }[] {
  const pairs: { first: number; second: number }[] = [];
  for (let run = 1; run < count; run *= 2)
    for (let apart = run; apart >= 1; apart /= 2)
      for (let from = apart % run; from + apart < count; from += 2 * apart)
        for (let first = from; first < Math.min(from + apart, count - apart); first++)
          if (Math.floor(first / (2 * run)) === Math.floor((first + apart) / (2 * run))) pairs.push({ first, second: first + apart });
  return pairs;
}

/** Keys of a selection of tokens, and what it writes, in CUDA. */
interface SelectionText {
  readonly params: string;
  readonly args: readonly KernelArg[];
  /** Statements that return the key of the entry at `at`, of `token`. */
  readonly key: string;
  /** A statement for each entry at `at`, with its key `own`, and whether it is `taken`. */
  readonly write?: string;
  /** A statement for each expert `e` and `group`, with the `key` of the last entry taken. */
  readonly last?: string;
}
/** Selects the best tokens of each expert. */
export function bestTokens(name: string, s: TokenSelection, { params, args, key, write = "", last = "" }: SelectionText): KernelPart {
  const entries = s.sequences * s.length;
  const body = render("cuda/select.cu", {
    ...{ name, params, key, entries, experts: s.experts, count: Math.min(s.count, entries), top: s.bits - 8 },
    ...{ slices: s.slices, sequences: s.sequences, length: s.length, positions: s.slices * s.length, write, last },
  });
  return { body, launch: { entry: name, grid: [s.experts, s.groups, 1], threads: 256, shared: 0, args: [...args] } };
}
