/** Kernels of the masks of the router: the best experts of a token, by one invocation, and the best tokens of an expert, by one workgroup. */
import { render } from "../../../templates/bindings.ts";
import { drop, expertChoiceMask } from "../../ops/capacity.ts";
import { topKMask, topKMaskBiased } from "../../ops/router.ts";
import { type GeneratedKernel, type KernelSpec, operandOf, wgslKernel } from "../kernelSpec.ts";
import { capacitySelection, type ExpertSelection, expertChoice, type TokenSelection, topKOf } from "../selection.ts";
import { THREADS } from "./reduce.ts";
import { type Binding, bindingOf, type EntryPoint, float, foldGrid, kernel } from "./text.ts";

/** One entry and its text. */
export interface ShaderPart {
  readonly entry: EntryPoint;
  readonly text: string;
}
const made = (spec: KernelSpec, { entry, text }: ShaderPart): GeneratedKernel => kernel(spec, [entry], [text]);

const mask: Binding = { arg: "c", type: "f32" };
/** WGSL kernels of the router. */
export const router = {
  top_k_mask: wgslKernel(topKMask, (spec) => made(spec, bestExperts(spec, topKOf(spec), mask))),
  top_k_mask_biased: wgslKernel(topKMaskBiased, (spec) =>
    made(spec, bestExperts(spec, topKOf(spec, { operand: operandOf(spec, "bias"), sign: spec.d.sign }), mask)),
  ),
  apply_capacity: wgslKernel(drop, (spec) => {
    const { position, pad } = spec.d;
    return made(
      spec,
      bestTokens(spec, capacitySelection(spec), {
        buffers: (position ? ["c", "d"] : ["p", "c", "d"]).map((arg) => ({ arg, type: "f32" })),
        key: position ? "return select(0u, 1u, c[at] > 0.0);" : "return select(0u, bitcast<u32>(p[at]) + 1u, c[at] > 0.0);",
        write: `d[at] = select(0.0, 1.0, ${pad ? "taken" : "taken && own > 0u"});`,
      }),
    );
  }),
  expert_choice_mask: wgslKernel(expertChoiceMask, (spec) =>
    made(
      spec,
      bestTokens(spec, expertChoice(spec), {
        buffers: ["p", "c"].map((arg) => ({ arg, type: "f32" })),
        ...{ key: "return bitcast<u32>(p[at]);", write: "c[at] = select(0.0, 1.0, taken);" },
      }),
    ),
  ),
};

/** Writes the mask of the best experts of each token, or their least value, to `to`. */
export function bestExperts({ op, name }: Pick<KernelSpec, "op" | "name">, s: ExpertSelection, to: Binding): ShaderPart {
  const { bias } = s;
  const workgroups = Math.ceil(s.tokens / THREADS);
  const text = render("wgsl/top_k_mask.wgsl", {
    ...{ op, entry: name, threads: THREADS, index: foldGrid(workgroups).index, tokens: s.tokens, experts: s.experts },
    ...{ k: s.k, words: Math.ceil(s.experts / 32), out: s.threshold ? "least" : "c", threshold: s.threshold },
    score: bias ? `f32(x[first + e]) + ${float(bias.sign)} * bias[e]` : "f32(x[first + e])",
    ...{ grouped: s.groups > 1, groups: s.groups, groupSize: s.groupSize, groupTopK: s.groupTopK, groupScores: s.groupScores },
  });
  const buffers = [bindingOf(s.x), ...(bias ? [bindingOf(bias.operand)] : []), { ...to, ...(s.threshold ? { name: "least" } : {}) }];
  return { entry: { entry: name, grid: workgroups, threads: THREADS, buffers }, text };
}

/** Keys of a selection of tokens, and what it writes, in WGSL. */
interface SelectionText {
  readonly buffers: readonly Binding[];
  /** Statements that return the key of the entry at `at`, of `token`. */
  readonly key: string;
  /** A statement for each entry at `at`, with its key `own`, and whether it is `taken`. */
  readonly write?: string;
  /** A statement for each `column` (group and expert), with the `key` of the last entry taken. */
  readonly last?: string;
}
/** Selects the best tokens of each expert. */
export function bestTokens(
  { op, name }: Pick<KernelSpec, "op" | "name">,
  s: TokenSelection,
  { buffers, key, write = "", last = "" }: SelectionText,
): ShaderPart {
  const entries = s.sequences * s.length;
  const columns = s.groups * s.experts;
  const text = render("wgsl/select.wgsl", {
    ...{ op, entry: name, index: foldGrid(columns).index, columns, key, entries, experts: s.experts, count: Math.min(s.count, entries) },
    ...{ passes: s.bits / 8, run: Math.ceil(entries / THREADS), slices: s.slices, sequences: s.sequences, length: s.length },
    ...{ positions: s.slices * s.length, write, last },
  });
  return { entry: { entry: name, grid: columns, threads: THREADS, buffers }, text };
}
