/** What a corpus holds as numbers: the bytes of a text, ids as a tokenizer wrote them, labels beside them. Files are read a slice at a time. */
import type { Job } from "../schemas/job.ts";
import { Trouble } from "../schemas/trouble.ts";

/** A file that can be read at any place. */
export interface Text {
  /** What people know it by. */
  readonly path: string;
  readonly bytes: number;
  /** Fills `into` with the bytes that start at `at`. */
  readonly read: (into: Uint8Array, at: number) => void;
}

/** A label of a token from which nothing is learnt; the number that PyTorch and Hugging Face have for it. */
export const IGNORED = -100;

export interface Tokens {
  readonly path: string;
  readonly count: number;
  /** What a person counts: `bytes` of a text, else `tokens`. */
  readonly unit: "bytes" | "tokens";
  /** Fills `into` with those that start at token `at`. */
  read(into: Int32Array, at: number): void;
}
export type Written = Pick<Job["data"], "format" | "dtype"> & Pick<Job["model"], "vocab">;

const reads = {
  text: { width: 1, at: (view: DataView, byte: number) => view.getUint8(byte) },
  u16: { width: 2, at: (view: DataView, byte: number) => view.getUint16(byte, true) },
  u32: { width: 4, at: (view: DataView, byte: number) => view.getUint32(byte, true) },
  i32: { width: 4, at: (view: DataView, byte: number) => view.getInt32(byte, true) },
} as const;

/** Numbers of a file; `wrong` says what is wrong with one of them, at its place. Only those that are read are looked at. */
function numbersOf(file: Text, kind: keyof typeof reads, wrong: (x: number, at: number) => Trouble | undefined): Tokens {
  const { width, at: one } = reads[kind];
  let bytes = new Uint8Array();
  return {
    ...{ path: file.path, count: file.bytes / width, unit: kind === "text" ? "bytes" : "tokens" },
    read(into, from) {
      const length = into.length * width;
      if (bytes.length < length) bytes = new Uint8Array(length);
      const slice = bytes.subarray(0, length);
      file.read(slice, from * width);
      const view = new DataView(slice.buffer, 0, length);
      for (let i = 0; i < into.length; i++) {
        const x = one(view, i * width);
        const problem = wrong(x, from + i);
        if (problem) throw problem;
        into[i] = x;
      }
    },
  };
}

/** Throws a Trouble where the file is none of what it is said to be: of a text at once, of ids when they are read. */
export function idsOf(file: Text, { format, dtype, vocab }: Written): Tokens {
  const [kind, unit] = format === "text" ? (["text", "byte"] as const) : ([dtype, "token"] as const);
  const ids = numbersOf(file, kind, (id, at) =>
    id < vocab
      ? undefined
      : new Trouble(
          `${file.path}: ${unit} ${at} of the corpus is ${id}, outside a vocabulary of ${vocab}`,
          format === "text"
            ? "set model.vocab to 256 or more: tokenizer bytes makes every byte a token"
            : `see that data.dtype is what the file holds (it is read as ${dtype}), and that model.vocab is its tokenizer's`,
        ),
  );
  if (!Number.isInteger(ids.count))
    throw new Trouble(
      `${file.path}: the corpus has ${file.bytes} bytes, which is no whole number of ids in ${dtype}`,
      "see that data.dtype is what the file holds, and that the file is complete",
    );
  if (format === "text" && vocab < 256) readAll(ids);
  return ids;
}

function readAll(ids: Tokens): void {
  const chunk = new Int32Array(2 ** 20);
  for (let at = 0; at < ids.count; at += chunk.length) ids.read(chunk.subarray(0, Math.min(chunk.length, ids.count - at)), at);
}

/** One label for each token of the corpus. */
export function labelsOf(file: Text, ids: Tokens, vocab: number): Tokens {
  if (file.bytes !== 4 * ids.count)
    throw new Trouble(
      `${file.path}: ${file.bytes} bytes of labels are ${file.bytes / 4} in i32, and the corpus ${ids.path} has ${ids.count} tokens`,
      "write one i32 for each token of data.path",
    );
  return numbersOf(file, "i32", (label, at) =>
    label === IGNORED || (label >= 0 && label < vocab)
      ? undefined
      : new Trouble(
          `${file.path}: label ${at} is ${label}: neither ${IGNORED}, which is ignored, nor an id of a vocabulary of ${vocab}`,
          "see that the file holds labels in i32, little-endian",
        ),
  );
}
