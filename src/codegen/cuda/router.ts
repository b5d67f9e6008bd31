/** Who goes where, as a map of ones among zeros: a token's best experts, in the registers of one warp; an expert's best tokens, by one block. */
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import { type CudaGenerator, type GeneratedKernel, type KernelSpec, positionText } from "../kernelSpec.ts";
import { type GeneratedLaunch, type KernelArg, startOf } from "../launchArgs.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
import { source } from "./prelude.ts";

export const choice: Readonly<Record<string, CudaGenerator>> = {
  top_k_mask: (spec) => made(spec, bestExperts(spec)),
  top_k_mask_biased: (spec) => made(spec, bestExperts(spec)),
  apply_capacity(spec) {
    const { A, P, J, L, E, capacity, position, pad } = spec.d;
    const key = position ? "return c[at] > 0.0f;" : "return c[at] > 0.0f ? __float_as_uint(p[at]) + 1 : 0;";
    const column = { groups: A! * J!, slices: J!, sequences: P!, length: L!, experts: E!, count: capacity! };
    const operands = position ? { params: "const float* c, float* d", args: ["c", "d"] } : undefined;
    return made(
      spec,
      bestTokens(spec, {
        params: "const float* p, const float* c, float* d",
        args: ["p", "c", "d"],
        ...operands,
        ...column,
        key,
        bits: position ? 8 : 32,
        write: pad ? "d[at] = taken;" : "d[at] = taken && own > 0;",
      }),
    );
  },
  expert_choice_mask(spec) {
    const { A, P, S, E, capacity } = spec.d;
    const column = { groups: A!, slices: 1, sequences: P!, length: S!, experts: E!, count: capacity! };
    return made(
      spec,
      bestTokens(spec, {
        ...column,
        params: "const float* p, float* c",
        args: ["p", "c"],
        key: "return __float_as_uint(p[at]);",
        bits: 32,
        write: "c[at] = taken;",
      }),
    );
  },
  uniform_mask(spec) {
    const { B, S, E, k, S0, E0, chunk, ranks } = spec.d;
    const body = render("cuda/uniform_mask.cu", {
      name: spec.name,
      cells: B! * S! * E!,
      positions: S!,
      experts: E!,
      k: k!,
      position: positionText("index", chunk!, ranks!),
      allPositions: S0!,
      allExperts: E0!,
    });
    const args = ["c", startOf("B"), startOf("S"), startOf("E")];
    return made(spec, { body, launch: { entry: spec.name, grid: [Math.ceil((B! * S! * E!) / 256), 1, 1], threads: 256, shared: 0, args } });
  },
};
const made = (spec: KernelSpec, { body, launch }: KernelPart): GeneratedKernel => ({ source: source(spec, body), launches: [launch] });

interface KernelPart {
  readonly body: string;
  readonly launch: GeneratedLaunch;
}

interface TopK {
  readonly name?: string;
  readonly k?: number;
  readonly sign?: number;
  readonly groups?: number;
  /** The buffer that receives the k-th best score of each token. */
  readonly threshold?: KernelArg;
}
/** Per token the map of its k best; or, where it is told a buffer for that, the k-th best score. */
export function bestExperts(
  spec: KernelSpec,
  { name = spec.name, k = spec.d.k!, sign = spec.d.sign ?? 0, groups = spec.d.groups ?? 1, threshold }: TopK = {},
): KernelPart {
  const { E, group_top_k = 1, group_scores = 0 } = spec.d;
  const rows = spec.size.x! / E!;
  // one warp at most, whatever it has to hold
  const { lanes, ...shares } = shareRow(E!, vectorOf(E!, [spec.dtype.x!, "f32"]), Number.POSITIVE_INFINITY);
  invariant(k <= E!, `${k} of ${E} experts`);
  const bias = spec.dtype.bias !== undefined;
  const body = render("cuda/top_k_mask.cu", {
    ...{
      name,
      ...shares,
      lanes,
      width: E!,
      rows,
      k,
      x: cudaType(spec.dtype.x!),
      bias,
      sign: f32(sign),
      threshold: threshold !== undefined,
    },
    ...{ grouped: groups > 1, groups, groupSize: E! / groups, groupTopK: group_top_k, groupScores: group_scores },
  });
  const grid: [number, number, number] = [Math.ceil(rows / (shares.threads / lanes)), 1, 1];
  return {
    body,
    launch: { entry: name, grid, threads: shares.threads, shared: 0, args: ["x", ...(bias ? ["bias"] : []), threshold ?? "c"] },
  };
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
  readonly params: string;
  readonly args: readonly KernelArg[];
  /** Statements that return the key of the entry at `at`, of `token`; its `bits` lowest bits say all. */
  readonly key: string;
  readonly bits: 8 | 32;
  /** What is written at `at` of an entry whose key is `own`, which is `taken` or not; or, without, once per column, of the last key taken. */
  readonly write?: string;
  readonly last?: string;
}
export function bestTokens(spec: KernelSpec, c: Column, name = spec.name): KernelPart {
  const entries = c.sequences * c.length;
  const body = render("cuda/select.cu", {
    ...{ name, params: c.params, key: c.key, entries, experts: c.experts, count: Math.min(c.count, entries), top: c.bits - 8 },
    ...{
      slices: c.slices,
      sequences: c.sequences,
      length: c.length,
      positions: c.slices * c.length,
      write: c.write ?? "",
      last: c.last ?? "",
    },
  });
  return { body, launch: { entry: name, grid: [c.experts, c.groups, 1], threads: 256, shared: 0, args: c.args } };
}
