/** The variants of attention: one table, so that nothing reads them from the names of ops. */
import type { OpName } from "../../schemas/opNames.ts";

/** The ops that compute attention, or its gradient; `attention_merge` combines their results. */
export type AttentionOp = Exclude<Extract<OpName, `attention${string}`>, "attention_merge">;

/** What an op of attention computes. */
export interface AttentionVariant {
  readonly grad: boolean;
  /** The keys are a shard. */
  readonly part: boolean;
  /** A query attends to keys of its own document. */
  readonly documents: boolean;
  /** Weights are dropped. */
  readonly drops: boolean;
}

const none: AttentionVariant = { grad: false, part: false, documents: false, drops: false };
const [grad, part, documents, drops] = [{ grad: true }, { part: true }, { documents: true }, { drops: true }];

/** The variant of each op of attention. */
const attentionVariants: Readonly<Record<AttentionOp, AttentionVariant>> = {
  attention: none,
  attention_grad: { ...none, ...grad },
  attention_part: { ...none, ...part },
  attention_part_grad: { ...none, ...part, ...grad },
  attention_dropout: { ...none, ...drops },
  attention_dropout_grad: { ...none, ...drops, ...grad },
  attention_dropout_part: { ...none, ...drops, ...part },
  attention_dropout_part_grad: { ...none, ...drops, ...part, ...grad },
  attention_documents: { ...none, ...documents },
  attention_documents_grad: { ...none, ...documents, ...grad },
  attention_documents_part: { ...none, ...documents, ...part },
  attention_documents_part_grad: { ...none, ...documents, ...part, ...grad },
  attention_dropout_documents: { ...none, ...drops, ...documents },
  attention_dropout_documents_grad: { ...none, ...drops, ...documents, ...grad },
  attention_dropout_documents_part: { ...none, ...drops, ...documents, ...part },
  attention_dropout_documents_part_grad: { ...none, ...drops, ...documents, ...part, ...grad },
};

/** Returns the variant of an op; undefined if it computes no attention. */
export const attentionVariant = (op: OpName): AttentionVariant | undefined =>
  (attentionVariants as Readonly<Partial<Record<OpName, AttentionVariant>>>)[op];
