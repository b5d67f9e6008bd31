/** Sizes that follow from keys of a job, apart from its schema, which is slow to load. */
import type { Job } from "./job.ts";

/** Returns the rows of the embedding and of the head: the ids of the tokenizer, rounded up to a multiple. */
export const paddedVocab = ({ vocab, vocab_multiple }: Pick<Job["model"], "vocab" | "vocab_multiple">): number =>
  Math.ceil(vocab / vocab_multiple) * vocab_multiple;

/** Returns how many channels of a head are rotated, beginning with the first. */
export const rotatedWidth = ({ head_dim, rope }: Pick<Job["model"], "head_dim" | "rope">): number => Math.floor(head_dim * rope.fraction);
