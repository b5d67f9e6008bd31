/**
 * Sizes of attention kernels, for all targets. Kernels iterate in position order, so causality is a prefix of keys (forward) and a suffix of
 * queries (backward), also under zigzag sharding, where a shard consists of two ranges of positions.
 */
import { dropsOf } from "../ops/dropout.ts";
import { invariant } from "../ops/op.ts";
import type { KernelSpec } from "./kernelSpec.ts";

type Numbers = Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C" | "W" | "scale" | "chunk" | "ranks", number>>;
/** Local sizes and variant of one attention kernel. */
export interface AttentionSizes extends Numbers {
  /** The keys are a shard that begins at start(U); some queries may attend to none of them. */
  readonly part: boolean;
  readonly grad: boolean;
  /** Dropout of weights (ops/attentionDropout.ts): a word below the threshold drops a weight; kept weights are multiplied by the factor. */
  readonly drops?: ReturnType<typeof dropsOf> & {
    /** Whether four consecutive keys have four consecutive positions if the first index is a multiple of four. */
    readonly keysAligned4: boolean;
  };
}

/** Reads the sizes from a kernel spec. Throws a BrokenInvariant for shards that no mesh makes. */
export function attentionSizes({ op, d }: KernelSpec): AttentionSizes {
  const { B, S, U, G, M, C, W, scale, chunk, ranks } = d as Numbers;
  // shards have equal sizes: each consists of whole zigzag blocks or lies within one
  for (const n of chunk ? [S, U] : [])
    invariant(n % chunk === 0 || chunk % n === 0, `${op}: a piece of ${n} tokens is neither blocks of ${chunk} nor in one`);
  invariant((d.copies ?? 1) === 1 || G === 1, `${op}: ${G} groups on a rank share key heads`);
  const drops = !op.startsWith("attention_dropout") ? {} : { drops: { ...dropsOf(d.drop!), keysAligned4: chunk % 4 === 0 } };
  return { B, S, U, G, M, C, W, scale, chunk, ranks, part: op.includes("_part"), grad: op.endsWith("_grad"), ...drops };
}

/** Returns whether a shard of `count` tokens is not in position order: it has more than the two zigzag blocks of one rank. */
export const isReordered = ({ chunk }: Pick<AttentionSizes, "chunk">, count: number): boolean => chunk > 0 && count > 2 * chunk;
