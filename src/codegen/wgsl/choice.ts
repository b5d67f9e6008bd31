/** Who goes where, as a map of ones among zeros: a token's best experts, by one invocation; an expert's best tokens, by one workgroup. */
import { render } from "../../../templates/bindings.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { THREADS } from "./reduce.ts";
import { type Binding, type EntryPoint, float, foldGrid, kernel, scalar } from "./text.ts";

export interface ShaderPart {
  readonly entry: EntryPoint;
  readonly text: string;
}
const made = (spec: KernelSpec, { entry, text }: ShaderPart): GeneratedKernel => kernel(spec, [entry], [text]);

const mask: Binding = { arg: "c", type: "f32" };
/** Per token the map of its k best; or, where it is told a buffer for that, the k-th best score. */
export function bestExperts(
  spec: KernelSpec,
  { entry: name = spec.name, k = spec.d.k!, sign = spec.d.sign ?? 0, groups = spec.d.groups ?? 1, to = mask, threshold = false } = {},
): ShaderPart {
  const { E, group_top_k = 1, group_scores = 0 } = spec.d;
  const bias = spec.dtype.bias !== undefined;
  const tokens = spec.size.x! / E!;
  const workgroups = Math.ceil(tokens / THREADS);
  const operands: Binding[] = ["x", ...(bias ? ["bias"] : [])].map((arg) => ({ arg, type: scalar(spec.dtype[arg]!) }));
  const text = render("wgsl/top_k_mask.wgsl", {
    ...{ op: spec.op, entry: name, threads: THREADS, index: foldGrid(workgroups).index, tokens, experts: E! },
    ...{ k, words: Math.ceil(E! / 32), out: threshold ? "least" : "c", threshold },
    score: bias ? `f32(x[first + e]) + ${float(sign)} * bias[e]` : "f32(x[first + e])",
    ...{ grouped: groups > 1, groups, groupSize: E! / groups, groupTopK: group_top_k, groupScores: group_scores },
  });
  const buffers = [...operands, { ...to, ...(threshold ? { name: "least" } : {}) }];
  return { entry: { entry: name, grid: workgroups, threads: THREADS, buffers }, text };
}

interface Column {
  /** Groups of tokens: of `sequences`, and of the positions one of `pieces` of `length`. */
  readonly groups: number;
  readonly slices: number;
  readonly sequences: number;
  readonly length: number;
  readonly experts: number;
  /** How many entries of a column are taken. */
  readonly count: number;
  readonly buffers: readonly Binding[];
  /** Statements that return the key of the entry at `at`, of `token`; its `bits` lowest bits say all. */
  readonly key: string;
  readonly bits: 8 | 32;
  /** What is written at `at` of an entry whose key is `own`, which is `taken` or not; or, without, once per column, of the last key taken. */
  readonly write?: string;
  readonly last?: string;
}
export function bestTokens({ op, name }: Pick<KernelSpec, "op" | "name">, c: Column): ShaderPart {
  const entries = c.sequences * c.length;
  const columns = c.groups * c.experts;
  const text = render("wgsl/select.wgsl", {
    ...{
      op,
      entry: name,
      index: foldGrid(columns).index,
      columns,
      key: c.key,
      entries,
      experts: c.experts,
      count: Math.min(c.count, entries),
    },
    ...{ passes: c.bits / 8, run: Math.ceil(entries / THREADS), slices: c.slices, sequences: c.sequences, length: c.length },
    ...{ positions: c.slices * c.length, write: c.write ?? "", last: c.last ?? "" },
  });
  return { entry: { entry: name, grid: columns, threads: THREADS, buffers: c.buffers }, text };
}

function drop(spec: KernelSpec): GeneratedKernel {
  const { A, P, J, L, E, capacity, position, pad } = spec.d;
  return made(
    spec,
    bestTokens(spec, {
      ...{ groups: A! * J!, slices: J!, sequences: P!, length: L!, experts: E!, count: capacity! },
      buffers: (position ? ["c", "d"] : ["p", "c", "d"]).map((arg) => ({ arg, type: "f32" })),
      key: position ? "return select(0u, 1u, c[at] > 0.0);" : "return select(0u, bitcast<u32>(p[at]) + 1u, c[at] > 0.0);",
      bits: position ? 8 : 32,
      write: `d[at] = select(0.0, 1.0, ${pad ? "taken" : "taken && own > 0u"});`,
    }),
  );
}
function expertChoiceMask(spec: KernelSpec): GeneratedKernel {
  const { A, P, S, E, capacity } = spec.d;
  return made(
    spec,
    bestTokens(spec, {
      ...{ groups: A!, slices: 1, sequences: P!, length: S!, experts: E!, count: capacity! },
      buffers: ["p", "c"].map((arg) => ({ arg, type: "f32" })),
      ...{ key: "return bitcast<u32>(p[at]);", bits: 32, write: "c[at] = select(0.0, 1.0, taken);" },
    }),
  );
}

export const choice = {
  top_k_mask: (spec: KernelSpec): GeneratedKernel => made(spec, bestExperts(spec)),
  top_k_mask_biased: (spec: KernelSpec): GeneratedKernel => made(spec, bestExperts(spec)),
  ...{ apply_capacity: drop, expert_choice_mask: expertChoiceMask },
};
