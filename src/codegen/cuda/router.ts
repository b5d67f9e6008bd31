/** Who goes where, as a map of ones among zeros: a token's best experts, in the registers of one warp; an expert's best tokens, by one block. */
import type { Launch } from "../../../schemas/plan.ts";
import { render } from "../../../templates/bindings.ts";
import { invariant } from "../../ops/op.ts";
import { type CudaMaker, type Made, positionText, type Use } from "../kernelSpec.ts";
import { cudaType, f32, vectorOf } from "./elementwise.ts";
import { shareRow } from "./norm.ts";
import { source } from "./prelude.ts";

export const choice: Readonly<Record<string, CudaMaker>> = {
  choose: (use) => made(use, bestExperts(use)),
  choose_biased: (use) => made(use, bestExperts(use)),
  drop(use) {
    const { A, P, J, L, E, capacity, position, pad } = use.d;
    const key = position ? "return c[at] > 0.0f;" : "return c[at] > 0.0f ? __float_as_uint(p[at]) + 1 : 0;";
    const column = { groups: A! * J!, pieces: J!, sequences: P!, length: L!, experts: E!, count: capacity! };
    const operands = position ? { params: "const float* c, float* d", args: ["c", "d"] } : undefined;
    return made(
      use,
      bestTokens(use, {
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
  choose_tokens(use) {
    const { A, P, S, E, capacity } = use.d;
    const column = { groups: A!, pieces: 1, sequences: P!, length: S!, experts: E!, count: capacity! };
    return made(
      use,
      bestTokens(use, {
        ...column,
        params: "const float* p, float* c",
        args: ["p", "c"],
        key: "return __float_as_uint(p[at]);",
        bits: 32,
        write: "c[at] = taken;",
      }),
    );
  },
  choose_evenly(use) {
    const { B, S, E, k, S0, E0, chunk, ranks } = use.d;
    const body = render("cuda/choose_evenly.cu", {
      name: use.name,
      cells: B! * S! * E!,
      positions: S!,
      experts: E!,
      k: k!,
      position: positionText("index", chunk!, ranks!),
      allPositions: S0!,
      allExperts: E0!,
    });
    const args = ["c", "start(B)", "start(S)", "start(E)"];
    return made(use, { body, launch: { entry: use.name, grid: [Math.ceil((B! * S! * E!) / 256), 1, 1], threads: 256, shared: 0, args } });
  },
};
const made = (use: Use, { body, launch }: Part): Made => ({ source: source(use, body), launches: [launch] });

interface Part {
  readonly body: string;
  readonly launch: Launch;
}

/** Per token the map of its k best; or, where it is told a buffer for that, the k-th best score. */
export function bestExperts(
  use: Use,
  { name = use.name, k = use.d.k!, sign = use.d.sign ?? 0, groups = use.d.groups ?? 1, threshold = "" } = {},
): Part {
  const { E, group_top_k = 1, group_scores = 0 } = use.d;
  const rows = use.size.x! / E!;
  // one warp at most, whatever it has to hold
  const { lanes, ...shares } = shareRow(E!, vectorOf(E!, [use.dtype.x!, "f32"]), Number.POSITIVE_INFINITY);
  invariant(k <= E!, `${k} of ${E} experts`);
  const bias = use.dtype.bias !== undefined;
  const body = render("cuda/choose.cu", {
    ...{ name, ...shares, lanes, width: E!, rows, k, x: cudaType(use.dtype.x!), bias, sign: f32(sign), threshold: threshold !== "" },
    ...{ grouped: groups > 1, groups, groupSize: E! / groups, groupTopK: group_top_k, groupScores: group_scores },
  });
  const grid: [number, number, number] = [Math.ceil(rows / (shares.threads / lanes)), 1, 1];
  return {
    body,
    launch: { entry: name, grid, threads: shares.threads, shared: 0, args: ["x", ...(bias ? ["bias"] : []), threshold || "c"] },
  };
}

interface Column {
  /** Groups of tokens: of `sequences`, and of the positions one of `pieces` of `length`. */
  readonly groups: number;
  readonly pieces: number;
  readonly sequences: number;
  readonly length: number;
  readonly experts: number;
  /** How many entries of a column are taken. */
  readonly count: number;
  readonly params: string;
  readonly args: readonly string[];
  /** Statements that return the key of the entry at `at`, of `token`; its `bits` lowest bits say all. */
  readonly key: string;
  readonly bits: 8 | 32;
  /** What is written at `at` of an entry whose key is `own`, which is `taken` or not; or, without, once per column, of the last key taken. */
  readonly write?: string;
  readonly last?: string;
}
export function bestTokens(use: Use, c: Column, name = use.name): Part {
  const entries = c.sequences * c.length;
  const body = render("cuda/select.cu", {
    ...{ name, params: c.params, key: c.key, entries, experts: c.experts, count: Math.min(c.count, entries), top: c.bits - 8 },
    ...{
      pieces: c.pieces,
      sequences: c.sequences,
      length: c.length,
      positions: c.pieces * c.length,
      write: c.write ?? "",
      last: c.last ?? "",
    },
  });
  return { body, launch: { entry: name, grid: [c.experts, c.groups, 1], threads: 256, shared: 0, args: [...c.args] } };
}
