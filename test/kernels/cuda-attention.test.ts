/**
 * CUDA's attention and its gradient equal their reference: in 16-bit floats on the tensor cores and in f32, for any width of heads, any
 * number of query heads that share keys, any shards of the sequence, and any order of these. The sources run as C++ on the CPU.
 */
import { describe, expect, test } from "vitest";
import type { Arch } from "../../schemas/devices.ts";
import type { Dtype } from "../../schemas/dtypes.ts";
import { attention as generators } from "../../src/codegen/cuda/attention.ts";
import { longestOfShares, orderOf, shareOf, stepsOf } from "../../src/codegen/cuda/attentionOrder.ts";
import type { KernelSpec } from "../../src/codegen/kernelSpec.ts";
import type { GeneratedLaunch } from "../../src/codegen/launchArgs.ts";
import { ops } from "../../src/ops/index.ts";
import { dimSize } from "../../src/ops/signature.ts";
import { type Buffers, type ContractCase, rounded } from "../support/contract.ts";
import { hold } from "../support/contractCheck.ts";
import { cudaDevice, firstGpu } from "../support/cudaDevice.ts";
import { cudaEmulator, type Emulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { documentsOf, random } from "../support/opCases.ts";
import { byTier, full, once } from "../support/tiers.ts";

interface Shape extends Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C", number>> {
  /** The width of values: default: C. */
  readonly W?: number;
  readonly start: number;
  /** The keys are a piece, which begins here. */
  readonly keyStart?: number;
  readonly zigzag?: readonly [chunk: number, ranks: number];
  /** The probability that a weight is dropped. */
  readonly drop?: number;
  /** Tokens of a document on average; without it there is none. */
  readonly documents?: number;
  /** Keys grow with their position, and so do the largest scores of a query from block to block. */
  readonly growing?: true;
  readonly arch: Arch;
  readonly type: "bf16" | "f16" | "f32";
  /** Also in the fast tier: of each kind of kernel one, pieces, zigzag order, f16, dropped weights. */
  readonly fast?: true;
}
const shapes: readonly Shape[] = [
  // one block, blocks cut short on both sides, and a head of each kind
  { B: 1, S: 5, U: 5, G: 1, M: 1, C: 16, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 130, U: 260, G: 1, M: 2, C: 128, start: 129, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 130, U: 130, G: 1, M: 1, C: 128, start: 0, arch: "sm_80", type: "bf16" },
  { B: 2, S: 131, U: 131, G: 2, M: 2, C: 64, start: 0, arch: "sm_100a", type: "bf16" },
  // 100 KiB of shared memory: one tile of queries for the gradients of 64 keys; a block of four warps for the widest heads
  { B: 1, S: 200, U: 200, G: 1, M: 2, C: 128, start: 0, arch: "sm_86", type: "bf16" },
  { B: 1, S: 130, U: 160, G: 1, M: 1, C: 192, W: 128, start: 30, arch: "sm_89", type: "bf16" },
  { B: 1, S: 70, U: 290, G: 1, M: 8, C: 32, start: 191, arch: "sm_90a", type: "bf16" },
  // shards that attend to few of the keys, and keys to which no query attends
  { B: 1, S: 33, U: 300, G: 2, M: 4, C: 48, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 65, U: 513, G: 1, M: 1, C: 80, start: 129, arch: "sm_80", type: "bf16" },
  { B: 1, S: 129, U: 129, G: 3, M: 1, C: 96, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 66, U: 66, G: 1, M: 2, C: 112, start: 0, arch: "sm_100a", type: "bf16" },
  { B: 1, S: 193, U: 193, G: 2, M: 1, C: 64, start: 0, arch: "sm_90a", type: "bf16" },
  // heads of 64 have three warpgroups and wider blocks of keys in long sequences
  { B: 1, S: 70, U: 2100, G: 1, M: 1, C: 64, start: 2030, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 200, U: 1100, G: 1, M: 2, C: 64, start: 900, arch: "sm_90a", type: "bf16" },
  // the largest scores grow, so that sums and outputs are rescaled: by all keys, by a shard, and by some warps only
  { B: 1, S: 200, U: 600, G: 1, M: 1, C: 128, start: 400, arch: "sm_90a", type: "bf16", growing: true },
  { B: 1, S: 130, U: 300, G: 1, M: 1, C: 192, W: 128, start: 250, keyStart: 20, arch: "sm_90a", type: "f16", growing: true },
  { B: 1, S: 330, U: 330, G: 1, M: 1, C: 256, start: 0, arch: "sm_90a", type: "bf16", growing: true },
  // so many heads that a head's keys are taken in waves: from the last to the first, and alternating
  { B: 15, S: 2, U: 300, G: 4, M: 1, C: 16, start: 298, arch: "sm_80", type: "bf16" },
  { B: 15, S: 2, U: 300, G: 4, M: 1, C: 16, start: 298, arch: "sm_90a", type: "bf16" },
  // f32 arithmetic: f32, and heads that the tensor cores do not take
  { B: 2, S: 67, U: 140, G: 2, M: 2, C: 24, start: 70, arch: "sm_90a", type: "f32", fast: true },
  { B: 1, S: 129, U: 129, G: 1, M: 4, C: 128, start: 0, arch: "sm_80", type: "f32" },
  { B: 1, S: 30, U: 150, G: 1, M: 2, C: 7, start: 3, arch: "sm_90a", type: "f32" },
  { B: 1, S: 66, U: 66, G: 2, M: 1, C: 160, start: 0, arch: "sm_100a", type: "bf16" },
  { B: 1, S: 66, U: 66, G: 1, M: 2, C: 20, start: 0, arch: "sm_90a", type: "bf16" },
  // values of a width of their own: latent attention's, narrow and wide ones
  { B: 1, S: 130, U: 160, G: 2, M: 1, C: 192, W: 128, start: 30, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 70, U: 130, G: 1, M: 2, C: 192, W: 128, start: 60, arch: "sm_80", type: "bf16" },
  { B: 1, S: 129, U: 129, G: 2, M: 2, C: 48, W: 32, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 140, U: 140, G: 1, M: 1, C: 16, W: 112, start: 0, arch: "sm_100a", type: "bf16" },
  { B: 1, S: 70, U: 70, G: 2, M: 1, C: 24, W: 16, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 66, U: 80, G: 1, M: 2, C: 192, W: 130, start: 14, arch: "sm_80", type: "f32" },
  // pieces of the keys: before, across and after the queries, on every kind of kernel
  { B: 1, S: 130, U: 70, G: 1, M: 2, C: 128, start: 100, keyStart: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 330, U: 200, G: 1, M: 1, C: 128, start: 40, keyStart: 200, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 130, U: 130, G: 2, M: 2, C: 64, start: 0, keyStart: 130, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 200, U: 100, G: 2, M: 1, C: 192, W: 128, start: 10, keyStart: 150, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 200, U: 100, G: 1, M: 2, C: 48, W: 64, start: 0, keyStart: 50, arch: "sm_80", type: "bf16" },
  { B: 1, S: 70, U: 70, G: 1, M: 1, C: 64, start: 0, keyStart: 70, arch: "sm_100a", type: "bf16" },
  { B: 2, S: 130, U: 70, G: 2, M: 2, C: 24, W: 16, start: 5, keyStart: 60, arch: "sm_80", type: "f32" },
  // zigzag, all keys: blocks that tiles divide, and blocks that they do not
  { B: 1, S: 256, U: 512, G: 1, M: 1, C: 128, start: 256, zigzag: [128, 2], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 128, U: 512, G: 1, M: 2, C: 64, start: 128, zigzag: [64, 4], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 256, U: 768, G: 1, M: 1, C: 64, start: 512, zigzag: [128, 3], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 128, U: 384, G: 2, M: 1, C: 192, W: 128, start: 0, zigzag: [64, 3], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 64, U: 256, G: 1, M: 2, C: 80, start: 192, zigzag: [64, 2], arch: "sm_100a", type: "bf16" },
  { B: 1, S: 96, U: 288, G: 1, M: 2, C: 128, start: 96, zigzag: [48, 3], arch: "sm_80", type: "bf16" },
  { B: 1, S: 32, U: 256, G: 1, M: 2, C: 32, start: 96, zigzag: [64, 2], arch: "sm_90a", type: "bf16" },
  { B: 2, S: 24, U: 96, G: 2, M: 2, C: 24, start: 48, zigzag: [12, 4], arch: "sm_90a", type: "f32" },
  // gradients on Hopper's own products: every pair of widths, rows of which the last block has one more
  { B: 1, S: 129, U: 129, G: 1, M: 2, C: 64, W: 128, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 65, U: 130, G: 2, M: 1, C: 128, W: 64, start: 65, arch: "sm_90a", type: "f16" },
  { B: 1, S: 70, U: 70, G: 1, M: 1, C: 192, W: 64, start: 0, arch: "sm_90a", type: "bf16" },
  // query heads of a key head: not to be split, and split in four
  { B: 1, S: 70, U: 70, G: 1, M: 3, C: 64, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 2, S: 200, U: 200, G: 1, M: 8, C: 64, start: 0, arch: "sm_90a", type: "bf16" },
  // heads of 256: a piece of the keys, zigzag order, f16, query heads of a key head split in two and not; documents are below
  { B: 1, S: 130, U: 170, G: 1, M: 2, C: 256, start: 40, arch: "sm_90a", type: "bf16" },
  { B: 2, S: 129, U: 129, G: 2, M: 3, C: 256, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 200, U: 100, G: 1, M: 1, C: 256, start: 40, keyStart: 90, arch: "sm_90a", type: "f16" },
  { B: 1, S: 128, U: 256, G: 1, M: 2, C: 256, start: 128, zigzag: [64, 2], arch: "sm_90a", type: "bf16" },
  // values of another width: Hopper's own products forward, those of any tensor core backward
  { B: 1, S: 70, U: 100, G: 1, M: 1, C: 256, W: 192, start: 10, keyStart: 20, arch: "sm_90a", type: "f16" },
  { B: 1, S: 64, U: 256, G: 2, M: 1, C: 256, W: 144, start: 64, zigzag: [64, 2], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 66, U: 66, G: 1, M: 1, C: 256, W: 64, start: 0, arch: "sm_90a", type: "bf16" },
  { B: 1, S: 66, U: 66, G: 1, M: 1, C: 256, start: 0, arch: "sm_100a", type: "bf16", drop: 0.1 },
  // f16: Hopper's own products, those of any tensor core, and plain arithmetic
  { B: 1, S: 130, U: 260, G: 1, M: 2, C: 128, start: 129, arch: "sm_90a", type: "f16" },
  { B: 1, S: 193, U: 193, G: 2, M: 1, C: 64, start: 0, arch: "sm_90a", type: "f16" },
  { B: 1, S: 65, U: 130, G: 1, M: 2, C: 80, start: 30, arch: "sm_80", type: "f16" },
  { B: 1, S: 40, U: 40, G: 2, M: 1, C: 24, start: 0, arch: "sm_90a", type: "f16" },
  { B: 1, S: 160, U: 160, G: 1, M: 1, C: 32, start: 0, zigzag: [20, 4], arch: "sm_80", type: "bf16", fast: true },
  // zigzag, a rank's keys: its own, of one before, of one after, of half of one, of two
  { B: 1, S: 300, U: 300, G: 1, M: 1, C: 128, start: 300, keyStart: 300, zigzag: [150, 3], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 256, U: 256, G: 1, M: 2, C: 64, start: 256, keyStart: 0, zigzag: [128, 2], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 256, U: 256, G: 1, M: 1, C: 128, start: 0, keyStart: 256, zigzag: [128, 2], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 140, U: 140, G: 1, M: 2, C: 192, W: 128, start: 140, keyStart: 140, zigzag: [70, 2], arch: "sm_90a", type: "bf16" },
  { B: 1, S: 128, U: 64, G: 2, M: 1, C: 48, start: 128, keyStart: 64, zigzag: [64, 2], arch: "sm_80", type: "bf16" },
  { B: 1, S: 64, U: 256, G: 1, M: 1, C: 96, start: 64, keyStart: 256, zigzag: [64, 4], arch: "sm_100a", type: "bf16" },
  { B: 1, S: 40, U: 80, G: 2, M: 2, C: 24, W: 16, start: 120, keyStart: 0, zigzag: [20, 4], arch: "sm_80", type: "f32" },
  // weights are dropped: on the tensor cores and in f32, pieces of the keys, zigzag order, queries and keys that do not begin at multiples of 16
  { B: 2, S: 130, U: 260, G: 2, M: 2, C: 128, start: 129, arch: "sm_90a", type: "bf16", drop: 0.3 },
  { B: 1, S: 70, U: 130, G: 1, M: 2, C: 192, W: 128, start: 60, arch: "sm_80", type: "bf16", drop: 0.1 },
  { B: 1, S: 65, U: 65, G: 2, M: 1, C: 64, start: 0, arch: "sm_100a", type: "f16", drop: 0.5 },
  { B: 1, S: 70, U: 150, G: 1, M: 2, C: 20, start: 3, arch: "sm_90a", type: "f32", drop: 0.2 },
  { B: 1, S: 200, U: 100, G: 1, M: 2, C: 48, W: 64, start: 0, keyStart: 50, arch: "sm_90a", type: "bf16", drop: 0.2, fast: true },
  { B: 1, S: 256, U: 512, G: 1, M: 1, C: 128, start: 256, zigzag: [128, 2], arch: "sm_90a", type: "bf16", drop: 0.2 },
  { B: 1, S: 300, U: 300, G: 1, M: 1, C: 64, start: 300, keyStart: 300, zigzag: [150, 3], arch: "sm_80", type: "bf16", drop: 0.2 },
  { B: 1, S: 40, U: 80, G: 2, M: 2, C: 24, W: 16, start: 120, keyStart: 0, zigzag: [20, 4], arch: "sm_80", type: "f32", drop: 0.2 },
  // Hopper's own products: heads of 64 and 256, query heads that are split
  { B: 1, S: 200, U: 200, G: 1, M: 2, C: 64, start: 0, arch: "sm_90a", type: "bf16", drop: 0.1 },
  { B: 1, S: 130, U: 141, G: 1, M: 1, C: 256, start: 10, arch: "sm_90a", type: "bf16", drop: 0.2 },
  { B: 1, S: 130, U: 90, G: 1, M: 2, C: 128, start: 100, keyStart: 50, arch: "sm_90a", type: "f16", drop: 0.2 },
  // that do in a shard, also by zigzag; so many that the threshold exceeds the numbers of f16
  { B: 1, S: 130, U: 90, G: 1, M: 2, C: 128, start: 96, keyStart: 48, arch: "sm_90a", type: "f16", drop: 0.2 },
  { B: 1, S: 160, U: 128, G: 1, M: 1, C: 64, start: 160, keyStart: 0, zigzag: [32, 8], arch: "sm_80", type: "bf16", drop: 0.2 },
  { B: 1, S: 70, U: 70, G: 1, M: 1, C: 64, start: 0, arch: "sm_90a", type: "bf16", drop: 0.97 },
  // documents: short ones, of which a tile has many, and long ones, of which tiles see some blocks; on every kind of kernel
  { B: 2, S: 260, U: 260, G: 1, M: 2, C: 128, start: 0, arch: "sm_90a", type: "bf16", documents: 100 },
  { B: 1, S: 520, U: 520, G: 1, M: 1, C: 64, start: 0, arch: "sm_90a", type: "bf16", documents: 300 },
  { B: 1, S: 390, U: 390, G: 2, M: 1, C: 192, W: 128, start: 0, arch: "sm_90a", type: "bf16", documents: 50 },
  { B: 2, S: 130, U: 260, G: 1, M: 2, C: 128, start: 129, arch: "sm_90a", type: "f16", documents: 8 },
  { B: 2, S: 261, U: 261, G: 1, M: 2, C: 48, start: 0, arch: "sm_80", type: "bf16", documents: 60 },
  { B: 1, S: 330, U: 330, G: 1, M: 1, C: 256, start: 0, arch: "sm_90a", type: "bf16", documents: 90 },
  { B: 2, S: 150, U: 150, G: 1, M: 2, C: 20, start: 0, arch: "sm_90a", type: "f32", documents: 40 },
  { B: 15, S: 2, U: 600, G: 4, M: 1, C: 16, start: 598, arch: "sm_80", type: "bf16", documents: 200 },
  // so many key heads that waves alternate; few, so that query heads are split
  { B: 4, S: 400, U: 400, G: 4, M: 1, C: 64, start: 0, arch: "sm_90a", type: "bf16", documents: 120 },
  { B: 1, S: 400, U: 400, G: 1, M: 8, C: 64, start: 0, arch: "sm_90a", type: "bf16", documents: 120 },
  { B: 1, S: 200, U: 200, G: 1, M: 1, C: 128, start: 200, keyStart: 0, arch: "sm_90a", type: "bf16", documents: 300 },
  { B: 2, S: 200, U: 200, G: 1, M: 1, C: 64, start: 200, keyStart: 200, arch: "sm_90a", type: "bf16", documents: 30 },
  { B: 1, S: 150, U: 70, G: 1, M: 2, C: 48, W: 64, start: 100, keyStart: 60, arch: "sm_80", type: "bf16", documents: 80 },
  { B: 1, S: 256, U: 512, G: 1, M: 1, C: 128, start: 256, zigzag: [128, 2], arch: "sm_90a", type: "bf16", documents: 150, fast: true },
  { B: 1, S: 300, U: 300, G: 1, M: 1, C: 128, start: 300, keyStart: 300, zigzag: [150, 3], arch: "sm_90a", type: "bf16", documents: 100 },
  { B: 1, S: 256, U: 256, G: 1, M: 1, C: 64, start: 0, keyStart: 256, zigzag: [128, 2], arch: "sm_90a", type: "bf16", documents: 400 },
  { B: 1, S: 96, U: 288, G: 1, M: 2, C: 128, start: 96, zigzag: [48, 3], arch: "sm_80", type: "bf16", documents: 70 },
  { B: 2, S: 40, U: 80, G: 2, M: 2, C: 24, W: 16, start: 120, keyStart: 0, zigzag: [20, 4], arch: "sm_80", type: "f32", documents: 50 },
  { B: 1, S: 300, U: 300, G: 1, M: 2, C: 128, start: 0, arch: "sm_90a", type: "bf16", documents: 90, drop: 0.2 },
  { B: 1, S: 140, U: 140, G: 1, M: 2, C: 48, start: 0, arch: "sm_80", type: "bf16", documents: 60, drop: 0.2 },
  { B: 1, S: 70, U: 70, G: 1, M: 2, C: 20, start: 0, arch: "sm_90a", type: "f32", documents: 20, drop: 0.2 },
];

function titleOf({ arch, type, B, S, U, G, M, C, W = C, start, keyStart, zigzag, drop, documents, growing }: Shape): string {
  const order = zigzag ? `, zigzag by ${zigzag[0]} over ${zigzag[1]}` : "";
  const keys = keyStart === undefined ? `${U} keys` : `${U} keys from ${keyStart}`;
  return `${type} for ${arch}, ${B} sequences, ${S} queries from ${start}, ${keys}${order}, ${G}·${M} heads of ${C === W ? C : `${C} and ${W}`}${drop ? `, of weights ${drop} dropped` : ""}${documents ? `, documents of ${documents}` : ""}${growing ? ", growing scores" : ""}`;
}

/** A case per op: the gradient's inputs are what the forward op makes of all keys. Scores are of the size that normalised layers leave. */
function casesOf(shape: Shape, seed: number): ContractCase[] {
  const next = random(seed);
  const { type, start, keyStart, zigzag = [0, 1], drop, documents, growing, B, S, U, G, M, C, W = C } = shape;
  const d = { B, S, U, G, M, C, W, scale: 1 / Math.sqrt(C), chunk: zigzag[0], ranks: zigzag[1] };
  const dropped = drop === undefined ? {} : { drop };
  const attributes = { key0: 0x9abcdef0, key1: 0x12345678 };
  // of several heads' ranks the third
  const starts = { S: start, U: keyStart ?? 0, G: drop ? 2 * G : 0, ...(drop ? attributes : {}) };
  const place = { start: (dim: string) => starts[dim as "S" | "U" | "G"] ?? 0, rows: new Int32Array(1) };
  const known: Record<string, Float32Array> = {};
  const name = `attention${drop ? "_dropout" : ""}${documents ? "_documents" : ""}${keyStart === undefined ? "" : "_part"}` as const;
  return [name, `${name}_grad` as const].map((name) => {
    const op = ops[name];
    const operands = [...op.inputs, ...op.outputs];
    const size = Object.fromEntries(operands.map((o) => [o.name, o.dimSpecs.reduce((n, s) => n * dimSize(s, d), 1)]));
    const dtype: Record<string, Dtype> = Object.fromEntries(
      operands.map((o) => [o.name, o.name === "lse" ? "f32" : ["sample", "documents"].includes(o.name) ? "i32" : type]),
    );
    // the gradient of a shard receives the log-sum-exp of all keys, which is no less than that of the shard
    if (name.endsWith("_part_grad")) known.lse = known.lse!.map((x) => (x === -Infinity ? 2 : x + 1) + next());
    if (drop) known.sample ??= Float32Array.from({ length: B }, (_, i) => 70_000 + i);
    if (documents) known.documents ??= documentsOf(d, place.start, documents);
    for (const { name } of op.inputs)
      known[name] ??= rounded(
        // [B,U,G,C]: 8 keys add to a score as much as its first size
        new Float32Array(size[name]!).map((_, i) => 2 * next() * (growing && name === "k" ? 1 + (Math.floor(i / (G * C)) % U) / 8 : 1)),
        type,
      );
    const made: Record<string, Float32Array> = Object.fromEntries(op.outputs.map((o) => [o.name, new Float32Array(size[o.name]!)]));
    op.cpu({ ...known, ...made }, { ...d, ...dropped, ...(drop ? attributes : {}) }, place);
    const data: Record<string, Buffers[string]> = { ...Object.fromEntries(op.inputs.map((o) => [o.name, known[o.name]!])), ...made };
    if (documents) data.documents = Int32Array.from(known.documents!);
    if (drop) data.sample = Int32Array.from(known.sample!);
    const want = Object.fromEntries(Object.entries(made).map(([n, x]) => [n, x.slice()]));
    for (const o of op.outputs) known[o.name] = rounded(made[o.name]!, dtype[o.name]!);
    const use: KernelSpec = {
      ...{ op: op.name, name: `${op.name}_${seed}`, d: { ...d, ...dropped }, size, dtype },
      ...{ accumulates: new Set<string>(), bound: 0, makesRows: false, mayOverflow: false },
    };
    return { title: titleOf(shape), use, data, starts, want };
  });
}

const missing = await emulatorMissing();
describe.skipIf(missing)(`emulated${missing ? ` (skipped: ${missing})` : ""}`, () => {
  interface Numbered {
    readonly shape: Shape;
    /** Seeds the data, and names the kernels. */
    readonly seed: number;
    readonly title: string;
  }
  const numbered = shapes.map((shape, i): Numbered => ({ shape, seed: i + 1, title: titleOf(shape) }));
  /** Of the first two orders, and of orders by chance. */
  type Executors = readonly [Emulator, Emulator];
  const isPersistent = ({ shape: s, seed }: Numbered) => s.arch === "sm_90a" && !s.drop && (!!s.keyStart || [2, 10].includes(seed));

  // each tier's kernels are one library
  for (const { options, rows } of byTier(numbered, ({ shape }) => shape.fast === true)) {
    const made = once(() => {
      const kernels = rows.map(({ shape, seed }) =>
        casesOf(shape, seed).map((c) => ({ ...c, made: generators[c.use.op as keyof typeof generators](c.use, shape.arch) })),
      );
      const executors: Executors = [cudaEmulator(kernels.flat()), cudaEmulator(kernels.flat(), [2, 3, 4, 5])];
      return { kernels: new Map(rows.map(({ seed }, i) => [seed, kernels[i]!])), executors };
    });
    test.each(rows)("$title", options, async ({ seed }) => {
      const { kernels, executors } = made();
      for (const kernel of kernels.get(seed)!) await hold(executors[0], kernel.made, kernel);
    });
    // of tiles that see no key, too
    const title = "in any order; one thread block that does all tiles after each other: $title";
    test.each(rows.filter(isPersistent))(title, options, async ({ seed }) => {
      const { kernels, executors } = made();
      const [forward, backward] = kernels.get(seed)!;
      await hold(executors[1], backward!.made, backward!);
      const launches = forward!.made.launches.map((l): GeneratedLaunch => ({ ...l, grid: [1, 1, 1] }));
      for (const e of executors) await hold(e, { ...forward!.made, launches }, forward!);
    });
  }
});

const gpu = firstGpu();
const none = typeof gpu === "string";
describe.skipIf(none)(`on this machine's GPU${none ? ` (skipped: ${gpu})` : ""}`, () => {
  // a test's name can be chosen by -t
  for (const [i, shape] of shapes.entries())
    if (shape.arch === "sm_90a")
      test(titleOf(shape), full, async () => {
        if (none) return;
        const cases = casesOf(shape, i + 1).map((c) => ({ ...c, made: generators[c.use.op as keyof typeof generators](c.use, gpu.arch) }));
        const device = cudaDevice(gpu, cases);
        for (const c of cases) await hold(device, c.made, c);
      });
});

describe.skipIf(missing)("heads in shares", () => {
  // kernels take shares from sizes at which keys and values exceed the cache: here three of eight heads, and a rest of two
  test("every tile of queries is some thread block's", full, async () => {
    const [forward] = casesOf({ B: 2, S: 200, U: 200, G: 2, M: 2, C: 64, start: 0, arch: "sm_90a", type: "bf16" }, 99);
    const made = generators.attention(forward!.use, "sm_90a");
    expect(made.source).toContain("SHARE = 8;");
    const shared = { ...made, source: made.source.replace("SHARE = 8;", "SHARE = 3;") };
    await hold(cudaEmulator([{ ...forward!, made: shared }]), shared, forward!);
  });
  test("as many as the cache holds, so that all thread blocks have equal work", () => {
    const tiling = { rows: 128, keys: 128, multiprocessors: 132 };
    const d = { S: 4096, U: 4096, M: 1, scale: 1, chunk: 0, ranks: 1, part: false, grad: false, documents: false };
    expect(shareOf({ ...d, B: 1, G: 128, C: 192, W: 128 }, tiling)).toBe(8);
    expect(shareOf({ ...d, B: 1, G: 4, M: 8, C: 128, W: 128 }, tiling)).toBe(32);
  });
  // sequences, key heads, query heads of each, tokens, widths, rows and keys of a tile
  test.each([
    [2, 4, 8, 4096, 128, 128, 128, 128],
    [2, 8, 4, 4096, 128, 128, 128, 128],
    [1, 4, 8, 4096, 128, 128, 128, 128],
    [1, 8, 4, 32768, 128, 128, 128, 128],
    [1, 128, 1, 4096, 192, 128, 128, 128],
    [2, 8, 2, 4096, 256, 256, 128, 80],
    [16, 12, 1, 1024, 64, 64, 192, 96],
    [4, 8, 4, 4096, 64, 64, 192, 112],
  ])(
    "%i sequences of %i·%i heads and %i tokens: the busiest thread block has 2 %% more than the mean at most",
    (B, G, M, S, C, W, rows, keys) => {
      const d = { B, G, M, S, U: S, C, W, scale: 1, chunk: 0, ranks: 1, part: false, grad: false, documents: false };
      const tiling = { rows, keys, multiprocessors: 132 };
      const longest = longestOfShares(shareOf(d, tiling), d, tiling);
      // one block of all heads on one multiprocessor has the whole work
      const whole = longestOfShares(B * G * M, d, { ...tiling, multiprocessors: 1 });
      expect(longest / (whole / 132)).toBeLessThan(1.02);
    },
  );
});

describe("the gradient of heads of 64 on Hopper", () => {
  const gradOf = (S: number, sharesDevice: boolean, d: Partial<Record<"G" | "C" | "W", number>> = {}) => {
    const [, c] = casesOf({ B: 1, S, U: S, G: 2, M: 1, C: 64, start: 0, arch: "sm_90a", type: "bf16" }, 98);
    const use: KernelSpec = { ...c!.use, d: { ...c!.use.d, ...d }, ...(sharesDevice && { sharesDevice }) };
    return { ...c!, use, made: generators.attention_grad(use, "sm_90a") };
  };
  test("a thread block takes items until none is left, beside collectives one: they begin when a block is done", () => {
    const blocksOf = (d: Parameters<typeof gradOf>[2]) => [false, true].map((shares) => gradOf(8, shares, d).made.launches[1]!.grid[0]);
    expect(blocksOf({ G: 180 })).toEqual([132, 180]);
    expect(blocksOf({ G: 180, C: 128, W: 128 })).toEqual([180, 180]);
  });
  test.skipIf(missing)("one thread block that takes all items, and one for each, make the same", full, async () => {
    const [all, each] = [gradOf(300, false), gradOf(300, true)];
    const launches = all.made.launches.map((l, i): GeneratedLaunch => (i === 1 ? { ...l, grid: [1, 1, 1] } : l));
    await hold(cudaEmulator([all], [0, 1, 2, 3]), { ...all.made, launches }, all);
    await hold(cudaEmulator([each]), each.made, each);
  });
});

test("one attention's gradient needs f32 sums of the queries' gradients, and a few numbers for each row", () => {
  for (const arch of ["sm_90a", "sm_100a"] as const) {
    const shape: Shape = { B: 2, S: 131, U: 131, G: 2, M: 1, C: 64, start: 0, arch, type: "bf16" };
    const [, c] = casesOf(shape, 1);
    const made = generators.attention_grad(c!.use, arch);
    const { B, S, G, M, C } = shape;
    // Hopper's own kernel takes 128 rows of such heads at a time
    const step = arch === "sm_90a" ? 128 : 64;
    const rows = B * G * M * Math.ceil(S / step) * step;
    expect(made.scratch! - rows * (4 * C + 8)).toBeLessThan(4 * rows);
  }
});

describe("the order of key blocks", () => {
  const ofGrad = { C: 128, W: 128, scale: 1, chunk: 0, ranks: 1, part: false, grad: true, documents: false };
  const tiling = { rows: 64, keys: 128, multiprocessors: 132, splits: true };
  const causal = (S: number) => Int32Array.from({ length: S / 128 }, (_, i) => 2 * i);
  // sequences, key heads, query heads of each; steps over those of a device that is always busy
  test.each([
    [2, 4, 8, 4096, 1.15],
    [2, 8, 4, 4096, 1.15],
    [4, 8, 4, 4096, 1.1],
    [1, 8, 4, 8192, 1.15],
    [1, 8, 4, 4096, 1.2],
    [1, 4, 8, 4096, 1.2],
    [1, 128, 1, 4096, 1.1],
  ])("%i sequences of %i·%i heads and %i tokens keep 132 multiprocessors busy", (B, G, M, S, most) => {
    const d = { B, G, M, S, U: S, ...ofGrad };
    const blocks = S / 64;
    const ideal = (B * G * M * (S / 128) * (blocks + 2)) / 2 / tiling.multiprocessors;
    expect(stepsOf(orderOf(d, tiling), d, causal(S), tiling)).toBeLessThan(most * ideal);
  });
  test("few key heads: blocks from the last to the first would take half as long again", () => {
    const d = { B: 2, G: 4, M: 8, S: 4096, U: 4096, ...ofGrad };
    const alike = stepsOf({ wave: 17, alternating: false, split: 1 }, d, causal(4096), tiling);
    expect(orderOf(d, tiling)).toEqual({ wave: 8, alternating: true, split: 2 });
    expect(alike / stepsOf(orderOf(d, tiling), d, causal(4096), tiling)).toBeGreaterThan(1.35);
  });
});
