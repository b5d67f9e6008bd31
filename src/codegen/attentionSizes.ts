/**
 * Sizes of attention kernels, for all targets. Kernels iterate in position order, so causality is a prefix of keys (forward) and a suffix of
 * queries (backward), also under zigzag sharding, where a shard consists of two ranges of positions.
 */
import { weightDropsOf } from "../ops/attentionDropout.ts";
import { attentionVariant } from "../ops/attentionVariants.ts";
import { invariant } from "../ops/op.ts";
import type { KernelSpec } from "./kernelSpec.ts";

type SizeName = "B" | "S" | "U" | "G" | "M" | "C" | "W" | "scale" | "chunk" | "ranks";
/** Kernel specs of attention; `drop` is an attribute of the ops with dropout. */
export type AttentionSpec = KernelSpec<"q" | "k" | "v" | "o" | "lse", SizeName>;
/** Kernel specs of the gradient of attention. */
export type AttentionGradSpec = KernelSpec<"q" | "k" | "v" | "o" | "lse" | "dy" | "dq" | "dk" | "dv", SizeName>;
type AnyAttentionSpec = AttentionSpec | AttentionGradSpec;

/** Local sizes and variant of one attention kernel. */
export interface AttentionSizes extends Readonly<Record<SizeName, number>> {
  /** The keys are a shard that begins at start(U); some queries may attend to none of them. */
  readonly part: boolean;
  readonly grad: boolean;
  /** A query attends to keys of its own document (ops/attentionDocuments.ts). */
  readonly documents: boolean;
  /** Dropout of weights (ops/attentionDropout.ts): 15 bits below the threshold drop a weight; kept weights are multiplied by the factor. */
  readonly drops?: ReturnType<typeof weightDropsOf> & {
    /** Whether the tokens of 16 indices from a multiple of 16 on have consecutive positions, in shards that begin at multiples of 16. */
    readonly inBlocksOf16: boolean;
  };
}

/** Reads the sizes from a kernel spec. Throws a BrokenInvariant for shards that no mesh makes. */
export function attentionSizes({ op, d }: Pick<AnyAttentionSpec, "op" | "d">): AttentionSizes {
  const { B, S, U, G, M, C, W, scale, chunk, ranks, drop } = d;
  // shards have equal sizes: each consists of whole zigzag blocks or lies within one
  for (const n of chunk ? [S, U] : [])
    invariant(
      n % chunk === 0 || chunk % n === 0,
      `${op}: a shard of ${n} tokens neither consists of blocks of ${chunk} nor lies within one`,
    );
  invariant((d.copies ?? 1) === 1 || G === 1, `${op}: ${G} groups on a rank share key heads`);
  const variant = attentionVariant(op);
  invariant(variant !== undefined, () => `${op} computes no attention`);
  const { drops: hasDropout, ...own } = variant;
  invariant(!hasDropout || drop !== undefined, `${op} has no attribute drop`);
  const drops = !hasDropout || drop === undefined ? {} : { drops: { ...weightDropsOf(drop), inBlocksOf16: chunk % 16 === 0 } };
  return { B, S, U, G, M, C, W, scale, chunk, ranks, ...own, ...drops };
}

/** Returns whether a shard of `count` tokens is not in position order: it has more than the two zigzag blocks of one rank. */
export const isReordered = ({ chunk }: Pick<AttentionSizes, "chunk">, count: number): boolean => chunk > 0 && count > 2 * chunk;
