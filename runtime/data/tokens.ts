/** Reads a corpus as tokens: bytes of a text, or token ids; and labels. Files are read in slices. */
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { formatOf, HEAD, invalidUtf8, wideTextOf } from "./fileFormat.ts";

/** A file with random access. */
export interface Text {
  /** The name in messages. */
  readonly path: string;
  readonly bytes: number;
  /** Fills `into` with the bytes that start at `at`. */
  readonly read: (into: Uint8Array, at: number) => void;
}

/** The label of tokens that the loss ignores, as in PyTorch and Hugging Face. */
export const IGNORED = -100;

/** Tokens with random access. */
export interface Tokens {
  readonly path: string;
  readonly count: number;
  /** The unit in messages: `bytes` of a text, else `tokens`. */
  readonly unit: "bytes" | "tokens";
  /** Fills `into` with the tokens from `at`. Throws a Trouble if one is invalid. */
  read(into: Int32Array, at: number): void;
}
/** How a job describes its corpus. */
export type Written = Pick<Job["data"], "format" | "dtype"> & Pick<Job["model"], "vocab">;

/** Ids are little-endian whole numbers. */
const idTypes = {
  u8: { width: 1, at: (view: DataView, byte: number) => view.getUint8(byte) },
  i8: { width: 1, at: (view: DataView, byte: number) => view.getInt8(byte) },
  u16: { width: 2, at: (view: DataView, byte: number) => view.getUint16(byte, true) },
  i16: { width: 2, at: (view: DataView, byte: number) => view.getInt16(byte, true) },
  u32: { width: 4, at: (view: DataView, byte: number) => view.getUint32(byte, true) },
  i32: { width: 4, at: (view: DataView, byte: number) => view.getInt32(byte, true) },
  i64: { width: 8, at: (view: DataView, byte: number) => Number(view.getBigInt64(byte, true)) },
} as const;
/** The type of token ids. */
export type IdType = keyof typeof idTypes;

/** Bytes of one id. */
export const widthOf = (type: IdType): number => idTypes[type].width;

/** The content of a Megatron index. */
export interface Index {
  readonly dtype: IdType;
  /** The number of ids of all documents. */
  readonly count: number;
  readonly documents: number;
  readonly sequences: number;
}

interface Checks {
  /** Returns the error of number `x` at index `at`, if it is invalid. */
  readonly number: (x: number, at: number) => Trouble | undefined;
  /** Returns the error of the bytes from offset `at`, if they are invalid. */
  readonly slice?: (bytes: Uint8Array, at: number) => Trouble | undefined;
}

/** Numbers of a file. Only those that are read are checked. */
function numbersOf(file: Text, type: IdType, unit: Tokens["unit"], { number, slice }: Checks): Tokens {
  const { width, at: one } = idTypes[type];
  let buffer = new Uint8Array();
  return {
    ...{ path: file.path, count: file.bytes / width, unit },
    read(into, from) {
      const length = into.length * width;
      if (buffer.length < length) buffer = new Uint8Array(length);
      const bytes = buffer.subarray(0, length);
      file.read(bytes, from * width);
      const problem = slice?.(bytes, from * width);
      if (problem) throw problem;
      const view = new DataView(bytes.buffer, 0, length);
      for (let i = 0; i < into.length; i++) {
        const x = one(view, i * width);
        const problem = number(x, from + i);
        if (problem) throw problem;
        into[i] = x;
      }
    },
  };
}

/**
 * The ids of a corpus: bytes of a text, or numbers of data.dtype; an index of Megatron decides their type and their number.
 * Throws a Trouble if the file has another format. A long text is checked at its start, and as it is read.
 */
export function idsOf(file: Text, written: Written, index?: Index): Tokens {
  const text = written.format === "text";
  refuseFormat(
    file,
    `the corpus is read as ${written.format}`,
    (path, head) => formatOf(path, head) ?? (text ? wideTextOf(path, head) : undefined),
  );
  if (text) return textOf(file, written.vocab);
  const ids = index ? indexedIds(file, written.vocab, index) : plainIds(file, written);
  if (index === undefined && zeroEverySecond(file, written.dtype))
    throw new Trouble(
      `${file.path}: every second id of the corpus is 0 when it is read as ${written.dtype}: its ids have twice as many bytes`,
      written.dtype === "u16" ? "set data.dtype: u32" : "write the ids as u32",
    );
  return ids;
}

function refuseFormat(file: Text, readAs: string, formatIn: typeof formatOf): void {
  const head = new Uint8Array(Math.min(HEAD, file.bytes));
  file.read(head, 0);
  const found = formatIn(file.path, head);
  if (found) throw new Trouble(`${file.path}: ${readAs}, and looks like ${found.name}`, found.fix);
}

const isId = (id: number, vocab: number): boolean => id >= 0 && id < vocab;

/** A text is checked whole up to this size before the first step. */
const CHECKED = 2 ** 24;

function textOf(file: Text, vocab: number): Tokens {
  const text = numbersOf(file, "u8", "bytes", {
    number: (id, at) =>
      isId(id, vocab)
        ? undefined
        : new Trouble(
            `${file.path}: byte ${at} of the corpus is ${id}, outside a vocabulary of ${vocab}`,
            "set model.vocab to 256 or more: tokenizer bytes makes every byte a token",
          ),
    slice: (bytes, at) => {
      const wrong = invalidUtf8(bytes, { first: at === 0, last: at + bytes.length === file.bytes });
      if (wrong === undefined) return undefined;
      return new Trouble(
        `${file.path}: the corpus is no UTF-8 text: byte ${at + wrong} is 0x${bytes[wrong]!.toString(16).padStart(2, "0")}`,
        `write a text in another encoding as UTF-8: iconv -f ISO-8859-1 -t UTF-8 ${file.path} > corpus.txt; for token ids set data.format: tokens`,
      );
    },
  });
  // every id has to be in the vocabulary before training starts; UTF-8 is read again with each batch
  readTo(text, vocab < 256 ? text.count : Math.min(text.count, CHECKED));
  return text;
}

function readTo(ids: Tokens, end: number): void {
  const chunk = new Int32Array(Math.min(end, 2 ** 20));
  for (let at = 0; at < end; at += chunk.length) ids.read(chunk.subarray(0, Math.min(chunk.length, end - at)), at);
}

const outside = (file: Text, vocab: number, fix: string) => (id: number, at: number) =>
  isId(id, vocab) ? undefined : new Trouble(`${file.path}: token ${at} of the corpus is ${id}, outside a vocabulary of ${vocab}`, fix);

function plainIds(file: Text, { dtype, vocab }: Written): Tokens {
  const fix = `see that data.dtype is what the file holds (it is read as ${dtype}), and that model.vocab is its tokenizer's`;
  const ids = numbersOf(file, dtype, "tokens", { number: outside(file, vocab, fix) });
  if (!Number.isInteger(ids.count))
    throw new Trouble(
      `${file.path}: the corpus has ${file.bytes} bytes, which is no whole number of ids in ${dtype}`,
      "see that data.dtype is what the file holds, and that the file is complete",
    );
  return ids;
}

function indexedIds(file: Text, vocab: number, { dtype, count, documents }: Index): Tokens {
  if (file.bytes !== count * widthOf(dtype))
    throw new Trouble(
      `${file.path}: the corpus has ${file.bytes} bytes, and its index ${count} ids in ${dtype} (documents: ${documents})`,
      "the two files are not of one data set, or one is not complete: write both again",
    );
  const fix = `see that model.vocab is that of its tokenizer; ids are read as ${dtype}, the type in its index`;
  return numbersOf(file, dtype, "tokens", { number: outside(file, vocab, fix) });
}

/** Returns whether the ids have twice the assumed width: every second id is then 0. */
function zeroEverySecond(file: Text, dtype: IdType): boolean {
  const ids = numbersOf(file, dtype, "tokens", { number: () => undefined });
  const head = new Int32Array(Math.min(1024, ids.count));
  if (head.length < 32) return false;
  ids.read(head, 0);
  return head.every((id, i) => i % 2 === 0 || id === 0) && head.some((id) => id !== 0);
}

/** Opens the labels, one per token. Throws a Trouble if their number differs, and on reading if one is invalid. */
export function labelsOf(file: Text, ids: Tokens, vocab: number): Tokens {
  refuseFormat(file, "the file of labels is read as i32", formatOf);
  if (file.bytes !== 4 * ids.count)
    throw new Trouble(
      `${file.path}: ${file.bytes} bytes of labels are ${file.bytes / 4} in i32, and the corpus ${ids.path} has ${ids.count} tokens`,
      "write one i32 for each token of data.path",
    );
  return numbersOf(file, "i32", "tokens", {
    number: (label, at) =>
      label === IGNORED || isId(label, vocab)
        ? undefined
        : new Trouble(
            `${file.path}: label ${at} is ${label}: neither ${IGNORED}, which is ignored, nor an id of a vocabulary of ${vocab}`,
            "see that the file holds labels in i32, little-endian",
          ),
  });
}
