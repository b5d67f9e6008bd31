/**
 * What kernels of attention are told, on any device. They take queries and keys in the order of their positions: then what a query sees
 * are the first keys, and what sees a key are the last queries, also in zigzag order, where a piece in that order is two runs of positions.
 */
import { dropsOf } from "../ops/dropout.ts";
import { invariant } from "../ops/op.ts";
import type { KernelSpec } from "./kernelSpec.ts";

type Numbers = Readonly<Record<"B" | "S" | "U" | "G" | "M" | "C" | "W" | "scale" | "chunk" | "ranks", number>>;
export interface AttentionSizes extends Numbers {
  /** The keys are a piece: it begins at start(U), and some queries may see none of it. */
  readonly part: boolean;
  readonly grad: boolean;
  /** Weights are dropped (ops/attentionDropout.ts): a word below the threshold drops, what is kept grows by the factor. */
  readonly drops?: ReturnType<typeof dropsOf> & {
    /** Four keys beside each other are at four positions beside each other wherever the first one's is a multiple of four. */
    readonly keysAligned4: boolean;
  };
}

export function attentionSizes({ op, d }: KernelSpec): AttentionSizes {
  const { B, S, U, G, M, C, W, scale, chunk, ranks } = d as Numbers;
  // pieces that a mesh cuts are all of one size: such a one begins with a block, or lies within one
  for (const n of chunk ? [S, U] : [])
    invariant(n % chunk === 0 || chunk % n === 0, `${op}: a piece of ${n} tokens is neither blocks of ${chunk} nor in one`);
  invariant((d.copies ?? 1) === 1 || G === 1, `${op}: ${G} groups on a rank share key heads`);
  const drops = !op.startsWith("attention_dropout") ? {} : { drops: { ...dropsOf(d.drop!), keysAligned4: chunk % 4 === 0 } };
  return { B, S, U, G, M, C, W, scale, chunk, ranks, part: op.includes("_part"), grad: op.endsWith("_grad"), ...drops };
}

/** A piece of so many tokens lies otherwise than in the order of positions: it has more blocks than one rank's two. */
export const isReordered = ({ chunk }: Pick<AttentionSizes, "chunk">, count: number): boolean => chunk > 0 && count > 2 * chunk;
