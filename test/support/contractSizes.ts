/** The sizes that the contract of kernels is held at: sets that every op gets, and the attributes that make its kernels different. */
import { unscaled } from "../../src/ops/rope.ts";
import type { Sizes } from "./opCases.ts";

export interface Set {
  readonly sizes: Sizes;
  readonly starts: Sizes;
  readonly rows: RowsMode;
  /** Types and accumulation in all combinations, rather than one of each. */
  readonly full?: boolean;
  /** Only for ops that move bytes: their products would take too long. */
  readonly light?: boolean;
  readonly only?: RegExp;
}
export type RowsMode = "some" | "gaps" | "one" | "none";

// some queries come before all keys of a piece
const cutStarts = { B: 3, S: 4, U: 6, E: 2, V: 5 };
export const sets: Readonly<Record<string, Set>> = {
  // no size a multiple of anything; more keys than any query sees
  odd: {
    sizes: {
      ...{ A: 2, P: 3, B: 3, S: 5, U: 12, D: 7, K: 5, N: 7, V: 9, E: 3 },
      ...{ F: 5, H: 3, G: 2, M: 2, C: 6, W: 10, k: 2, "#0": 3, "#1": 5 },
      ...{ J: 2, L: 3, capacity: 4, groups: 3, group_top_k: 2, group_scores: 1 },
    },
    ...{ starts: cutStarts, rows: "some", full: true },
  },
  four: {
    sizes: {
      ...{ A: 2, P: 1, B: 2, S: 8, U: 8, D: 16, K: 12, N: 20, V: 24, E: 4 },
      ...{ F: 8, H: 2, G: 2, M: 2, C: 8, W: 4, k: 1, "#0": 4, "#1": 12 },
      ...{ J: 1, L: 8, capacity: 3, groups: 2, group_top_k: 1, group_scores: 2 },
    },
    ...{ starts: {}, rows: "gaps" },
  },
  aligned: {
    sizes: {
      ...{ A: 1, P: 2, B: 1, S: 64, U: 64, D: 64, K: 64, N: 64, V: 64, E: 8 },
      ...{ F: 64, H: 4, G: 2, M: 2, C: 16, W: 16, k: 2, "#0": 64, "#1": 64 },
      ...{ J: 2, L: 32, capacity: 20, groups: 4, group_top_k: 2, group_scores: 1 },
    },
    ...{ starts: {}, rows: "one" },
  },
  large: {
    sizes: {
      ...{ A: 1, P: 1, B: 1, S: 70, U: 74, D: 96, K: 96, N: 128, V: 130, E: 8 },
      ...{ F: 96, H: 2, G: 1, M: 4, C: 64, W: 48, k: 2, "#0": 70, "#1": 96 },
      ...{ J: 1, L: 70, capacity: 30, groups: 2, group_top_k: 1, group_scores: 2 },
    },
    ...{ starts: cutStarts, rows: "some" },
  },
  // many workgroups
  long: {
    sizes: {
      ...{ A: 2, P: 1, B: 2, S: 300, U: 300, D: 130, N: 66, V: 515, E: 8 },
      ...{ F: 65, H: 4, G: 4, M: 1, C: 32, W: 32, k: 2, "#0": 300, "#1": 515 },
      ...{ J: 3, L: 100, capacity: 40, groups: 4, group_top_k: 2, group_scores: 2 },
    },
    ...{ starts: {}, rows: "some", light: true },
  },
  // rows longer than a workgroup, and experts
  wide: {
    sizes: {
      ...{ A: 1, P: 2, B: 2, S: 3, U: 3, D: 1030, N: 1028, V: 1026, E: 70 },
      ...{ F: 1100, H: 2, G: 2, M: 1, C: 256, W: 130, k: 8, "#0": 2, "#1": 1025 },
      ...{ J: 2, L: 2, capacity: 2, groups: 10, group_top_k: 3, group_scores: 2 },
    },
    ...{ starts: cutStarts, rows: "some", light: true },
  },
  empty: {
    sizes: {
      ...{ A: 1, P: 2, B: 2, S: 3, U: 3, D: 8, K: 8, N: 8, V: 8, E: 4 },
      ...{ F: 8, H: 2, G: 2, M: 1, C: 8, W: 8, k: 2, "#0": 2, "#1": 3 },
      ...{ J: 1, L: 3, capacity: 2, groups: 2, group_top_k: 1, group_scores: 1 },
    },
    ...{ starts: {}, rows: "none" },
  },
  // the second of two ranks' tokens, in zigzag order
  zigzag: {
    sizes: { B: 2, S: 16, U: 32, H: 2, G: 2, M: 2, C: 16, W: 16, chunk: 8, ranks: 2 },
    ...{ starts: { S: 16 }, rows: "some", only: /^attention/ },
  },
};

const always: Sizes = {
  ...{ normalize: 1, eps: 1e-2, sign: 1, count: 1000, c: 0.3, scale: 0.5, max: 1, chunk: 0, ranks: 1 },
  ...{
    beta1: 0.9,
    beta2: 0.999,
    momentum: 0.8,
    nesterov: 1,
    factor: 0.5,
    decay: 0.1,
    rate: 0.001,
    choices: 40,
    most: 100,
    ema: 0.9,
    S0: 400,
    E0: 75,
  },
  ...{ T: 3, row: 1, K: 3 },
  ...{ drop: 0.3, key0: 0x9abcdef0, key1: 0x12345678 },
  ...{ ...unscaled, theta: 10000, first: 0, interleaved: 0 },
};

/** Widths of an op's own at a set. */
const own: Readonly<Record<string, Readonly<Record<string, Sizes>>>> = {
  ...Object.fromEntries(
    ["rope", "rope_documents"].map((op) => [
      op,
      {
        // an odd number of channels before those that turn, some after them
        odd: { first: 1, width: 4, interleaved: 1, ...{ scaling: 3, factor: 8, original: 100, low: 1, high: 4, gain: 1.25 } },
        four: { width: 8, interleaved: 1, chunk: 2, ranks: 3 },
        aligned: { width: 16 },
        large: { first: 48, width: 16, ...{ scaling: 2, factor: 8, original: 64, low: 1, high: 4 }, chunk: 20, ranks: 2 },
        long: { width: 32, interleaved: 1, scaling: 1, factor: 4, gain: 0.5 },
        wide: { first: 128, width: 64, interleaved: 1 },
      },
    ]),
  ),
  ...Object.fromEntries(
    ["head_norm_rope", "head_norm_rope_grad"].map((op) => [
      op,
      {
        odd: { C: 6, interleaved: 1, ...{ scaling: 3, factor: 8, original: 100, low: 1, high: 4, gain: 1.25 } },
        four: { interleaved: 1, chunk: 2, ranks: 3 },
        aligned: { H: 9, sign: -1 },
        large: { C: 72, ...{ scaling: 2, factor: 8, original: 64, low: 1, high: 4 }, chunk: 20, ranks: 2 },
        long: { interleaved: 1, scaling: 1, factor: 4, gain: 0.5 },
        // more threads than a warp has
        wide: { C: 520 },
      },
    ]),
  ),
  ...Object.fromEntries(
    ["split", "join"].map((op) => [
      op,
      {
        odd: { A: 4, R: 3, Y: 7 },
        four: { A: 8, R: 4, Y: 12 },
        aligned: { A: 64, R: 16, Y: 80 },
        large: { A: 80, R: 6, Y: 86 },
        long: { A: 512, R: 64, Y: 576 },
        wide: { A: 1, R: 1024, Y: 1025 },
      },
    ]),
  ),
  ...Object.fromEntries(
    ["latent_kv", "latent_kv_grad"].map((op) => [
      op,
      // a key's own channels (Y − R), those that all heads share (R), a value's (W); a head's vector has Z = Y − R + W
      {
        odd: { R: 3, Y: 8, W: 7, Z: 12 },
        four: { R: 4, Y: 12, W: 8, Z: 16 },
        aligned: { R: 16, Y: 48, W: 32, Z: 64 },
        large: { R: 2, Y: 66, W: 48, Z: 112 },
        long: { H: 9, R: 8, Y: 24, W: 16, Z: 32 },
        wide: { R: 128, Y: 129, W: 1, Z: 2 },
      },
    ]),
  ),
  uniform_mask: { four: { chunk: 2, ranks: 2 } },
  // few heads to a gate, so that rows stay short
  ...Object.fromEntries(["sigmoid_gate", "sigmoid_gate_grad"].map((op) => [op, { long: { N: 2 }, wide: { N: 3 } }])),
};

/** All sizes and attributes of an op at a set. */
export function sizesAt(op: string, set: string): Sizes {
  const { sizes } = sets[set]!;
  return {
    ...{ ...always, ...sizes, ...own[op]?.[set] },
    ...(op.startsWith("attention") && { W: sizes.C!, scale: sizes.C! ** -0.5 }),
  };
}

/** Attributes that make another kernel of an op: each of its cases is there with all of these. */
const variants: Readonly<Record<string, readonly Sizes[]>> = {
  ...Object.fromEntries(
    ["rmsnorm", "rmsnorm_grad", "layernorm", "layernorm_grad", "head_layernorm_grad"].map((op) => [op, [{}, { offset: 1 }]]),
  ),
  top_k_mask: [{}, { groups: 1 }],
  top_k_mask_biased: [{}, { groups: 1, sign: -1 }],
  drop: [0, 1].flatMap((position) => [0, 1].map((pad) => ({ position, pad }))),
  combine_weights: [{}, { normalize: 0 }],
  muon_momentum: [{}, { nesterov: 0 }],
  orthogonalize: [{}, { coefficients: 1 }],
  orthogonalize_experts: [{}, { coefficients: 1 }],
  combine_weights_grad: [{}, { normalize: 0 }],
  // a shard ends within the ids
  ...Object.fromEntries(["row_max", "softmax_terms", "softmax_terms_grad"].map((op) => [op, [{}, { ids: 11 }]])),
  softmax_statistics: [{}, { ids: 7 }],
};
export const variantsOf = (op: string): readonly Sizes[] => variants[op] ?? [{}];
