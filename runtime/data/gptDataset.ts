/**
 * Samples of a data set as Megatron Core's GPTDataset makes them: documents in a random order, joined; samples of `seq` tokens run across
 * the ends of documents, neighbours share one token, and each epoch visits its samples in a random order.
 *
 * Megatron fixes the number of samples first and shuffles all epochs of it at once, so a longer run has another order. Here each epoch has
 * its own order of documents and of samples, and epochs are joined: sample i has the tokens from i x seq of that endless text, whatever
 * the length of the run. Epoch e owns the samples that begin in it.
 */
import { permutation } from "./permutation.ts";

/** A range of documents to draw samples from. */
export interface SampledDocuments {
  /** Tokens of each document. */
  readonly lengths: Int32Array;
  readonly seq: number;
  readonly seed: number;
  /** Distinguishes the random orders of several sources. */
  readonly name: string;
}
/** A piece of a document: `count` tokens from token `from` of it. */
export interface DocumentPiece {
  readonly document: number;
  readonly from: number;
  readonly count: number;
}

/** The documents of an epoch in order, and where each begins. */
interface EpochOrder {
  readonly documents: Uint32Array;
  readonly starts: Float64Array;
}

/** Returns the pieces of documents that make sample `n` of an endless run: `seq` + 1 tokens. The documents must hold a token. */
export function gptSamples({ lengths, seq, seed, name }: SampledDocuments): (n: number) => DocumentPiece[] {
  const total = lengths.reduce((sum, length) => sum + length, 0);
  const firstOf = (epoch: number): number => Math.ceil((epoch * total) / seq);
  const orders = newest<EpochOrder>(2, (epoch) => {
    const documents = permutation(lengths.length, seed, `${name}.documents`, epoch);
    const starts = new Float64Array(documents.length + 1);
    let at = 0;
    for (const [i, document] of documents.entries()) {
      starts[i] = at;
      at += lengths[document] ?? 0;
    }
    starts[documents.length] = at;
    return { documents, starts };
  });
  const shuffles = newest<Uint32Array>(1, (epoch) => permutation(firstOf(epoch + 1) - firstOf(epoch), seed, `${name}.samples`, epoch));

  return (n) => {
    let epoch = Math.floor((n * seq) / total);
    // the division may round; sample n of the run is sample n - firstOf(epoch) of its epoch
    while (firstOf(epoch + 1) <= n) epoch++;
    while (firstOf(epoch) > n) epoch--;
    const begin = (firstOf(epoch) + (shuffles(epoch)[n - firstOf(epoch)] ?? 0)) * seq;
    const pieces: DocumentPiece[] = [];
    let left = seq + 1;
    for (let at = begin; left > 0; ) {
      const own = Math.floor(at / total);
      const { documents, starts } = orders(own);
      let place = lastAtMost(starts, at - own * total);
      for (; left > 0 && place < documents.length; place++) {
        const document = documents[place] ?? 0;
        const from = at - own * total - (starts[place] ?? 0);
        const count = Math.min(left, (lengths[document] ?? 0) - from);
        if (count > 0) pieces.push({ document, from, count });
        at += count;
        left -= count;
      }
    }
    return pieces;
  };
}

/** Returns the pieces of sample `n` of documents in their order, each token once: `seq` + 1 tokens; the last sample may have fewer. */
export function wholeSamples({ lengths, seq }: Pick<SampledDocuments, "lengths" | "seq">): {
  readonly count: number;
  piecesOf(n: number): DocumentPiece[];
} {
  const starts = new Float64Array(lengths.length + 1);
  for (const [i, length] of lengths.entries()) starts[i + 1] = (starts[i] ?? 0) + length;
  const total = starts[lengths.length] ?? 0;
  return {
    count: Math.ceil(Math.max(0, total - 1) / seq),
    piecesOf(n) {
      const pieces: DocumentPiece[] = [];
      const [begin, end] = [n * seq, Math.min(total, (n + 1) * seq + 1)];
      for (let at = begin, document = lastAtMost(starts, begin); at < end; document++) {
        const from = at - (starts[document] ?? 0);
        const count = Math.min(end - at, (lengths[document] ?? 0) - from);
        if (count > 0) pieces.push({ document, from, count });
        at += Math.max(0, count);
      }
      return pieces;
    },
  };
}

/** Keeps the results for the latest `most` arguments. */
function newest<T>(most: number, make: (key: number) => T): (key: number) => T {
  const known = new Map<number, T>();
  return (key) => {
    const found = known.get(key);
    if (found !== undefined) return found;
    const made = make(key);
    for (const old of known.keys()) if (known.size >= most) known.delete(old);
    known.set(key, made);
    return made;
  };
}

/** The last index whose start is at most `at`. Documents without tokens share their start with the next. */
function lastAtMost(starts: Float64Array, at: number): number {
  let [low, high] = [0, starts.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if ((starts[middle] ?? 0) <= at) low = middle;
    else high = middle;
  }
  return low;
}

/**
 * Returns the documents of each part of a split such as 99990, 8, 2: part k has those from `bounds[k]` to `bounds[k + 1]`, by Megatron's
 * rounding of shares, halves to even.
 */
export function splitBounds(split: readonly number[], documents: number): number[] {
  const sum = split.reduce((all, share) => all + share, 0);
  const bounds = [0];
  let done = 0;
  for (const share of split) {
    done += share / sum;
    bounds.push(roundHalfEven(done * documents));
  }
  return bounds;
}

function roundHalfEven(x: number): number {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}
