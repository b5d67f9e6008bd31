/**
 * Batches of a byte-level text: ids [batch, seq] and their labels, the byte that follows each. A batch is a function of
 * how many sequences were read before it, and of its size. Where the text lies, on a disk or in memory, does not matter.
 */
import type { Job } from "../schemas/job.ts";
import { Trouble } from "../schemas/trouble.ts";
import { keyOf, philox } from "./philox.ts";

/** A text that can be read at any place. */
export interface Text {
  /** What people know it by. */
  readonly path: string;
  readonly bytes: number;
  /** Fills `into` with the bytes that start at `at`. */
  readonly read: (into: Uint8Array, at: number) => void;
}
export type Reading = {
  readonly seq: number;
  readonly batch: number;
  readonly vocab: number;
  readonly order: "sequential" | "shuffled";
  readonly seed: number;
};
type Batch = { readonly ids: Int32Array; readonly labels: Int32Array };
/** The next `rows` sequences after the first `first` of a run. */
export type BatchOf = (first: number, rows: number) => Batch;

/** Throws a Trouble where the text is too short, or has bytes outside the vocabulary. */
export function batchesOf(text: Text, reading: Reading): BatchOf {
  const { seq } = reading;
  check(text, reading);
  const startOf = orders[reading.order](text.bytes, reading);
  return (first, rows) => {
    const ids = new Int32Array(rows * seq);
    const labels = new Int32Array(rows * seq);
    const window = new Uint8Array(seq + 1);
    for (let row = 0; row < rows; row++) {
      text.read(window, startOf(first, row));
      ids.set(window.subarray(0, seq), row * seq);
      labels.set(window.subarray(1), row * seq);
    }
    return { ids, labels };
  };
}

/** Where in the corpus a row starts of the step before which so many sequences were read. */
type Order = (bytes: number, reading: Reading) => (first: number, row: number) => number;

const orders: Readonly<Record<Reading["order"], Order>> = {
  sequential:
    (bytes, { seq, batch }) =>
    (first, row) =>
      ((first * seq) % (bytes - batch * (seq + 1) - 1)) + row * seq,
  // Windows of seq bytes, end to end; each pass over the corpus visits all of them in an order of its own.
  shuffled: (bytes, { seq, seed }) => {
    const windows = Math.floor((bytes - 1) / seq);
    let epoch = -1;
    let order = new Uint32Array();
    return (first, row) => {
      const sample = first + row;
      const wanted = Math.floor(sample / windows);
      if (wanted !== epoch) order = permutation(windows, seed, (epoch = wanted));
      return order[sample % windows]! * seq;
    };
  },
};

/** Fisher-Yates; the draw for place i is a pure function of seed, epoch and i. */
function permutation(length: number, seed: number, epoch: number): Uint32Array<ArrayBuffer> {
  const [k0, k1] = keyOf(seed, "data.order");
  const words = new Uint32Array(4);
  const order = Uint32Array.from({ length }, (_, i) => i);
  for (let i = length - 1; i > 0; i--) {
    philox(words, i, 0, epoch, 0, k0, k1);
    // 53 random bits in [0, 1): no place is favoured by more than i / 2^53
    const uniform = (words[0]! * 2 ** 21 + (words[1]! >>> 11)) * 2 ** -53;
    const j = Math.floor(uniform * (i + 1));
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}

function check(text: Text, { seq, batch, vocab }: Reading): void {
  // One byte more than the sequential rule reads: its modulus must be at least 1
  const needed = batch * (seq + 1) + 2;
  if (text.bytes < needed) {
    throw new Trouble(
      `${text.path}: the corpus has ${text.bytes} bytes; a batch of ${batch} rows of ${seq} takes at least ${needed}`,
      "use a longer corpus, or lower train.global_batch or model.seq",
    );
  }
  if (vocab >= 256) return;
  const chunk = new Uint8Array(2 ** 20);
  for (let at = 0; at < text.bytes; at += chunk.length) {
    const part = chunk.subarray(0, Math.min(chunk.length, text.bytes - at));
    text.read(part, at);
    const wide = part.findIndex((byte) => byte >= vocab);
    if (wide >= 0) {
      throw new Trouble(
        `${text.path}: byte ${at + wide} of the corpus is ${part[wide]}, outside a vocabulary of ${vocab}`,
        "set model.vocab to 256 or more: tokenizer bytes makes every byte a token",
      );
    }
  }
}

/** How a job reads its text. */
export const readingOf = ({ train, model, data }: Job): Reading => ({
  seq: model.seq,
  batch: train.global_batch,
  vocab: model.vocab,
  order: data.order,
  seed: train.seed,
});
