/** Specs of the selections of the router, for all targets: the best experts of a token, and the best tokens of an expert. */

import type { quantile } from "../ops/balance.ts";
import type { drop, expertChoiceMask } from "../ops/capacity.ts";
import type { topKMask } from "../ops/router.ts";
import { type KernelOperand, type KernelSpec, operandOf, type SpecOf } from "./kernelSpec.ts";

/** For each token, the k experts with the largest x + sign · bias, or only the k-th largest value. */
export interface ExpertSelection {
  readonly x: KernelOperand;
  readonly bias?: { readonly operand: KernelOperand; readonly sign: number };
  readonly tokens: number;
  readonly experts: number;
  readonly k: number;
  /** Groups of adjacent experts; 1 if all experts are eligible. The best `groupTopK` groups by the sum of their `groupScores` largest scores are. */
  readonly groups: number;
  readonly groupSize: number;
  readonly groupTopK: number;
  readonly groupScores: number;
  /** Whether the result is the k-th largest value of each token; else the mask of ones. */
  readonly threshold: boolean;
}

type ScoresSpec = KernelSpec<"x", "E" | "k">;
/** Returns the selection of a top-k mask. */
export function topKOf(spec: SpecOf<typeof topKMask>, bias?: ExpertSelection["bias"]): ExpertSelection {
  const { groups = 1, group_top_k: groupTopK = 1, group_scores: groupScores = 0 } = spec.d;
  return { ...selectionOf(spec, spec.d.k, groups), groupTopK, groupScores, ...(bias ? { bias } : {}), threshold: false };
}
/** Returns the selection of the (k+1)-th largest x − bias of each token. */
export const thresholdOf = (spec: SpecOf<typeof quantile>): ExpertSelection => ({
  ...selectionOf(spec, spec.d.k + 1, 1),
  ...{ groupTopK: 1, groupScores: 0, bias: { operand: operandOf(spec, "bias"), sign: -1 }, threshold: true },
});
function selectionOf(spec: ScoresSpec, k: number, groups: number) {
  const x = operandOf<"x">(spec, "x");
  return { x, tokens: x.size / spec.d.E, experts: spec.d.E, k, groups, groupSize: spec.d.E / groups };
}

/** For each expert and group of tokens, the `count` entries with the largest keys. */
export interface TokenSelection {
  /** Groups of tokens: of `sequences`, and of one of `slices` ranges of `length` positions. */
  readonly groups: number;
  readonly slices: number;
  readonly sequences: number;
  readonly length: number;
  readonly experts: number;
  readonly count: number;
  /** How many of the lowest bits of a key may differ. */
  readonly bits: 8 | 32;
}

/** Returns the selection of the tokens that an expert of limited capacity keeps. By position, keys are only 0 or 1. */
export const capacitySelection = ({ d }: SpecOf<typeof drop>): TokenSelection => ({
  ...{ groups: d.A * d.J, slices: d.J, sequences: d.P, length: d.L, experts: d.E, count: d.capacity, bits: d.position ? 8 : 32 },
});
/** Returns the selection of the tokens that an expert chooses among whole microbatches. */
export const expertChoice = ({ d }: SpecOf<typeof expertChoiceMask>): TokenSelection => microbatches(d, d.capacity);
/** Returns the selection of the surpluses that exceed the quantile of an expert, and the quantile itself. */
export const quantileSelection = ({ d }: SpecOf<typeof quantile>): TokenSelection =>
  microbatches(d, Math.floor((d.P * d.S * d.k) / d.E) + 1);
const microbatches = (d: Readonly<Record<"A" | "P" | "S" | "E", number>>, count: number): TokenSelection => ({
  ...{ groups: d.A, slices: 1, sequences: d.P, length: d.S, experts: d.E, count, bits: 32 },
});
