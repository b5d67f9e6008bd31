/**
 * Byte-pair encoding: neighbours are merged, the pair of the lowest rank first, and of equal ranks the leftmost. Three kinds of files
 * differ in where ranks come from: a list of merges (tokenizer.json), ids of tokens (tiktoken), scores of pieces (SentencePiece).
 */

import { Trouble } from "../../../schemas/trouble.ts";
import type { BpeConfig } from "./tokenizerFile.ts";

/** What may be merged. */
export interface Merges {
  /** Returns the index of the merge of two neighbours; -1 if they are not merged. */
  readonly find: (left: number, right: number) => number;
  /** The id that a merge makes, by index. */
  readonly results: Int32Array;
  /** The rank of a merge, by index: below 2^21; undefined: the index is the rank. */
  readonly ranks?: Int32Array;
}

/** Above every position of a word: a key of the queue is rank x POSITIONS + position, exact as a double. */
const POSITIONS = 2 ** 31;

/**
 * Merges the ids of a word in place and returns how many are left. The queue holds a key for every pair that could be merged when it was
 * added; a key is stale if its place has another pair by now.
 */
export function mergeAll(ids: number[], { find, results, ranks }: Merges): number {
  const count = ids.length;
  const next = Int32Array.from({ length: count }, (_, i) => i + 1);
  const previous = Int32Array.from({ length: count }, (_, i) => i - 1);
  const queue = new Keys();
  const indexAt = (at: number): number => {
    const right = next[at] ?? count;
    return right < count ? find(ids[at] ?? -1, ids[right] ?? -1) : -1;
  };
  const rankOf = (index: number): number => (ranks ? (ranks[index] ?? 0) : index);
  const add = (at: number): void => {
    const index = at < 0 ? -1 : indexAt(at);
    if (index >= 0) queue.add(rankOf(index) * POSITIONS + at);
  };
  for (let i = 0; i + 1 < count; i++) add(i);
  let left = count;
  for (let key = queue.take(); key !== undefined; key = queue.take()) {
    const at = key % POSITIONS;
    // a place that was merged into its left neighbour has the id -1
    const index = ids[at] === -1 ? -1 : indexAt(at);
    if (index < 0 || rankOf(index) * POSITIONS + at !== key) continue;
    const right = next[at] ?? count;
    const after = next[right] ?? count;
    ids[at] = results[index] ?? -1;
    ids[right] = -1;
    next[at] = after;
    if (after < count) previous[after] = at;
    left--;
    add(at);
    add(previous[at] ?? -1);
  }
  let to = 0;
  for (let at = 0; at < count; at = next[at] ?? count) ids[to++] = ids[at] ?? -1;
  ids.length = to;
  return left;
}

/** A binary heap of numbers, the smallest first. */
class Keys {
  private readonly heap: number[] = [];

  add(key: number): void {
    const { heap } = this;
    let at = heap.length;
    heap.push(key);
    while (at > 0) {
      const parent = (at - 1) >> 1;
      const above = heap[parent] ?? key;
      if (above <= key) break;
      heap[at] = above;
      at = parent;
    }
    heap[at] = key;
  }

  take(): number | undefined {
    const { heap } = this;
    const [top] = heap;
    const last = heap.pop();
    if (last === undefined || heap.length === 0) return top;
    let at = 0;
    for (;;) {
      const child = 2 * at + 1;
      const first = heap[child];
      if (first === undefined) break;
      const second = heap[child + 1] ?? first;
      const least = Math.min(first, second);
      if (least >= last) break;
      heap[at] = least;
      at = second < first ? child + 1 : child;
    }
    heap[at] = last;
    return top;
  }
}

/** A table from pairs of ids to merges, with open addressing: a Map with numbers above 2^31 as keys takes three times as long. */
class PairTable {
  private readonly mask: number;
  private readonly lefts: Int32Array;
  private readonly rights: Int32Array;
  private readonly values: Int32Array;

  constructor(count: number) {
    const size = 2 ** Math.ceil(Math.log2(2 * count + 2));
    this.mask = size - 1;
    this.lefts = new Int32Array(size).fill(-1);
    this.rights = new Int32Array(size);
    this.values = new Int32Array(size);
  }
  private place(left: number, right: number): number {
    let at = (Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b)) >>> 0;
    at = (at ^ (at >>> 15)) & this.mask;
    while (this.lefts[at] !== -1 && (this.lefts[at] !== left || this.rights[at] !== right)) at = (at + 1) & this.mask;
    return at;
  }
  set(left: number, right: number, value: number): void {
    const at = this.place(left, right);
    this.lefts[at] = left;
    this.rights[at] = right;
    this.values[at] = value;
  }
  find(left: number, right: number): number {
    const at = this.place(left, right);
    return this.lefts[at] === -1 ? -1 : (this.values[at] ?? -1);
  }
}

/** The byte tokens of a vocabulary, `<0x00>` to `<0xFF>`; undefined for a byte without one. */
export const byteTokens = (idOf: (token: string) => number | undefined): readonly (number | undefined)[] =>
  Array.from({ length: 256 }, (_, byte) => idOf(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`));

/** Returns the model of a tokenizer.json. Throws a Trouble if a merge names no token. */
export function bpeOf(config: BpeConfig, path: string): (word: string, into: number[]) => void {
  const vocab = new Map(Object.entries(config.vocab));
  const { unk_token, fuse_unk, byte_fallback, ignore_merges } = config;
  const [prefix, suffix] = [config.continuing_subword_prefix ?? "", config.end_of_word_suffix ?? ""];
  const pairs = config.merges.map((merge) => (typeof merge === "string" ? cutAtSpace(merge) : merge));
  const table = new PairTable(pairs.length);
  const idOf = (token: string): number => {
    const id = vocab.get(token);
    if (id === undefined)
      throw new Trouble(`${path}: a merge names ${JSON.stringify(token)}, which the vocabulary lacks`, "copy the tokenizer again");
    return id;
  };
  const results = Int32Array.from(pairs, ([left, right], rank) => {
    table.set(idOf(left), idOf(right), rank);
    return idOf(left + right.slice(prefix.length));
  });
  const merges: Merges = { find: (left, right) => table.find(left, right), results };
  const unknown = unk_token === null ? undefined : vocab.get(unk_token);
  const bytes = byte_fallback ? byteTokens((token) => vocab.get(token)) : [];
  return (word, into) => {
    const whole = ignore_merges ? vocab.get(word) : undefined;
    if (whole !== undefined) {
      into.push(whole);
      return;
    }
    const ids: number[] = [];
    let fuses = false;
    const characters = Array.from(word);
    for (const [i, c] of characters.entries()) {
      const id = vocab.get((i > 0 ? prefix : "") + c + (i + 1 === characters.length ? suffix : ""));
      const fallback = id === undefined && byte_fallback ? Array.from(Buffer.from(c), (byte) => bytes[byte]) : [];
      const spelled = fallback.filter((byte) => byte !== undefined);
      if (id !== undefined) ids.push(id);
      else if (spelled.length > 0 && spelled.length === fallback.length) ids.push(...spelled);
      else if (unknown !== undefined && !(fuses && fuse_unk)) ids.push(unknown);
      fuses = id === undefined && spelled.length === 0;
    }
    if (ids.length > 1) mergeAll(ids, merges);
    for (const id of ids) into.push(id);
  };
}

function cutAtSpace(merge: string): [string, string] {
  const at = merge.indexOf(" ");
  return [merge.slice(0, at), merge.slice(at + 1)];
}
