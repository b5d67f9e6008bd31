/**
 * Attention within documents: a sequence of tokens consists of several documents, one after the other, and a query attends to the keys of its
 * own document at its own and earlier positions. `documents` holds for each token the position in the sequence at which its document begins,
 * so the visible keys are a range of positions. Queries carry this number and keys need none, so that shards of keys may be anywhere. These
 * are separate ops because their signatures have the additional input; kernels without it stay as they are.
 */
import { type Arrays, flopsOfGrad, flopsOfMix, mix, mixGrad, type Sizes } from "./attention.ts";
import { type DropSizes, keptOf } from "./attentionDropout.ts";
import { runtimeAttrs } from "./dropout.ts";
import { type Grads, op, type ShardContext } from "./op.ts";

export const attentionDocuments = op({
  name: "attention_documents",
  sig: "q[B,S,G*M*C] k[B,U!,G/copies*C] v[B,U!,G/copies*W] documents[B,S] -> o[B,S,G*M*W] lse[B,S,G*M]",
  attrs: ["scale", "chunk", "ranks"],
  types: { lse: "f32" },
  flops: flopsOfMix,
  cpu: mixWithin,
  grad({ q, k, v, documents }, { y, dy }, a): Grads {
    const { dq, dk, dv } = attentionDocumentsGrad.all({ q, k, v, documents, o: y, lse: y.node!.outs[1]!, dy }, a);
    return { q: dq, k: dk, v: dv };
  },
});
export const attentionDocumentsGrad = op({
  name: "attention_documents_grad",
  sig: "q[B,S,G*M*C] k[B,U!,G/copies*C] v[B,U!,G/copies*W] documents[B,S] o[B,S,G*M*W] lse[B,S,G*M] dy[B,S,G*M*W] -> dq[B,S,G*M*C] dk[B,U!,G/copies*C] dv[B,U!,G/copies*W]",
  attrs: ["scale", "chunk", "ranks"],
  flops: flopsOfGrad,
  cpu: mixGradWithin,
});
export const attentionDocumentsPart = op({
  name: "attention_documents_part",
  sig: "q[B,S,G*M*C] k[B,U,G/copies*C] v[B,U,G/copies*W] documents[B,S] -> o[B,S,G*M*W] lse[B,S,G*M]",
  attrs: ["scale", "chunk", "ranks"],
  reduction: "merge",
  types: { lse: "f32" },
  flops: flopsOfMix,
  cpu: mixWithin,
});
export const attentionDocumentsPartGrad = op({
  name: "attention_documents_part_grad",
  sig: "q[B,S,G*M*C] k[B,U,G/copies*C] v[B,U,G/copies*W] documents[B,S] o[B,S,G*M*W] lse[B,S,G*M] dy[B,S,G*M*W] -> dq[B,S,G*M*C] dk[B,U,G/copies*C] dv[B,U,G/copies*W]",
  attrs: ["scale", "chunk", "ranks"],
  flops: flopsOfGrad,
  cpu: mixGradWithin,
});
export const attentionDropoutDocuments = op({
  name: "attention_dropout_documents",
  sig: "q[B,S,G*M*C] k[B,U!,G/copies*C] v[B,U!,G/copies*W] documents[B,S] sample[B] -> o[B,S,G*M*W] lse[B,S,G*M]",
  attrs: ["scale", "drop", "chunk", "ranks"],
  types: { lse: "f32" },
  runtimeAttrs,
  flops: flopsOfMix,
  cpu: dropMixWithin,
  grad({ q, k, v, documents, sample }, { y, dy }, a): Grads {
    const { dq, dk, dv } = attentionDropoutDocumentsGrad.all({ q, k, v, documents, sample, o: y, lse: y.node!.outs[1]!, dy }, a);
    return { q: dq, k: dk, v: dv };
  },
});
export const attentionDropoutDocumentsGrad = op({
  name: "attention_dropout_documents_grad",
  sig: "q[B,S,G*M*C] k[B,U!,G/copies*C] v[B,U!,G/copies*W] documents[B,S] sample[B] o[B,S,G*M*W] lse[B,S,G*M] dy[B,S,G*M*W] -> dq[B,S,G*M*C] dk[B,U!,G/copies*C] dv[B,U!,G/copies*W]",
  attrs: ["scale", "drop", "chunk", "ranks"],
  runtimeAttrs,
  flops: flopsOfGrad,
  cpu: dropMixGradWithin,
});
export const attentionDropoutDocumentsPart = op({
  name: "attention_dropout_documents_part",
  sig: "q[B,S,G*M*C] k[B,U,G/copies*C] v[B,U,G/copies*W] documents[B,S] sample[B] -> o[B,S,G*M*W] lse[B,S,G*M]",
  attrs: ["scale", "drop", "chunk", "ranks"],
  reduction: "merge",
  types: { lse: "f32" },
  runtimeAttrs,
  flops: flopsOfMix,
  cpu: dropMixWithin,
});
export const attentionDropoutDocumentsPartGrad = op({
  name: "attention_dropout_documents_part_grad",
  sig: "q[B,S,G*M*C] k[B,U,G/copies*C] v[B,U,G/copies*W] documents[B,S] sample[B] o[B,S,G*M*W] lse[B,S,G*M] dy[B,S,G*M*W] -> dq[B,S,G*M*C] dk[B,U,G/copies*C] dv[B,U,G/copies*W]",
  attrs: ["scale", "drop", "chunk", "ranks"],
  runtimeAttrs,
  flops: flopsOfGrad,
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
