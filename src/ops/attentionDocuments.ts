/**
 * Attention within documents: a sequence of tokens consists of several documents, one after the other, and a query attends to the keys of its
 * own document at its own and earlier positions. `documents` holds for each token the position in the sequence at which its document begins,
 * so the visible keys are a range of positions. Queries carry this number and keys need none, so that shards of keys may be anywhere. These
 * are separate ops because their signatures have the additional input; kernels without it stay as they are.
 */
import { type Arrays, backward, forward, gradients, mix, mixGrad, operands, outcome, results, type Sizes } from "./attention.ts";
import { type DropSizes, dropBackward, dropForward, keptOf } from "./attentionDropout.ts";
import { type Grads, op, type ShardContext } from "./op.ts";

/** Causal attention within documents. */
export const attentionDocuments = op({
  name: "attention_documents",
  sig: `${operands.all} documents[B,S] -> ${results}`,
  ...forward,
  cpu: mixWithin,
  grad({ q, k, v, documents }, { y, dy }, a): Grads {
    const { dq, dk, dv } = attentionDocumentsGrad.all({ q, k, v, documents, o: y, lse: y.node!.outs[1]!, dy }, a);
    return { q: dq, k: dk, v: dv };
  },
});
/** The gradient of `attentionDocuments`. */
export const attentionDocumentsGrad = op({
  name: "attention_documents_grad",
  sig: `${operands.all} documents[B,S] ${outcome} -> ${gradients.all}`,
  ...backward,
  cpu: mixGradWithin,
});
/** Attention within documents to a shard of the keys. */
export const attentionDocumentsPart = op({
  name: "attention_documents_part",
  sig: `${operands.shard} documents[B,S] -> ${results}`,
  ...forward,
  reduction: "merge",
  cpu: mixWithin,
});
/** The gradient of `attentionDocumentsPart`. */
export const attentionDocumentsPartGrad = op({
  name: "attention_documents_part_grad",
  sig: `${operands.shard} documents[B,S] ${outcome} -> ${gradients.shard}`,
  ...backward,
  cpu: mixGradWithin,
});
/** Causal attention within documents, with dropout of weights. */
export const attentionDropoutDocuments = op({
  name: "attention_dropout_documents",
  sig: `${operands.all} documents[B,S] sample[B] -> ${results}`,
  ...dropForward,
  cpu: dropMixWithin,
  grad({ q, k, v, documents, sample }, { y, dy }, a): Grads {
    const { dq, dk, dv } = attentionDropoutDocumentsGrad.all({ q, k, v, documents, sample, o: y, lse: y.node!.outs[1]!, dy }, a);
    return { q: dq, k: dk, v: dv };
  },
});
/** The gradient of `attentionDropoutDocuments`. */
export const attentionDropoutDocumentsGrad = op({
  name: "attention_dropout_documents_grad",
  sig: `${operands.all} documents[B,S] sample[B] ${outcome} -> ${gradients.all}`,
  ...dropBackward,
  cpu: dropMixGradWithin,
});
/** Attention within documents to a shard of the keys, with dropout of weights. */
export const attentionDropoutDocumentsPart = op({
  name: "attention_dropout_documents_part",
  sig: `${operands.shard} documents[B,S] sample[B] -> ${results}`,
  ...dropForward,
  reduction: "merge",
  cpu: dropMixWithin,
});
/** The gradient of `attentionDropoutDocumentsPart`. */
export const attentionDropoutDocumentsPartGrad = op({
  name: "attention_dropout_documents_part_grad",
  sig: `${operands.shard} documents[B,S] sample[B] ${outcome} -> ${gradients.shard}`,
  ...dropBackward,
  cpu: dropMixGradWithin,
});

type Forward = "q" | "k" | "v" | "documents" | "o" | "lse";
type Backward = Forward | "dy" | "dq" | "dk" | "dv";

function mixWithin(t: Arrays<Forward>, d: Sizes, p: ShardContext): void {
  mix(t, d, p, { documents: t.documents });
}
function mixGradWithin(t: Arrays<Backward>, d: Sizes, p: ShardContext): void {
  mixGrad(t, d, p, { documents: t.documents });
}
function dropMixWithin(t: Arrays<Forward | "sample">, d: DropSizes, p: ShardContext): void {
  mix(t, d, p, { documents: t.documents, kept: keptOf(t.sample, d, p) });
}
function dropMixGradWithin(t: Arrays<Backward | "sample">, d: DropSizes, p: ShardContext): void {
  mixGrad(t, d, p, { documents: t.documents, kept: keptOf(t.sample, d, p) });
}
