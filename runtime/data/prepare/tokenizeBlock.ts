/** Tokenizes a block of documents: the work of one message to a worker. */
import { printable } from "../../../schemas/printable.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { invalidUtf8 } from "../fileFormat.ts";
import type { Tokenizer } from "../tokenizers/tokenizer.ts";
import type { DocumentRules, DocumentSource } from "./documents.ts";

/** How ids are made and written. */
export interface TokenRules {
  /** Appended to each document; undefined: nothing is. */
  readonly end: number | undefined;
  readonly dtype: "u16" | "i32";
}
/** The ids of a block as they are written, and the length of each document in ids. Documents without text are left out. */
export interface TokenizedBlock {
  readonly ids: Uint8Array<ArrayBuffer>;
  readonly lengths: Int32Array<ArrayBuffer>;
  /** Documents without text. */
  readonly empty: number;
  /** Bytes of text in UTF-8. */
  readonly textBytes: number;
}

/** Tokenizes the documents of a block in order. Throws a Trouble that names file and line. */
export function tokenizeBlock(
  sources: readonly DocumentSource[],
  tokenizer: Tokenizer,
  { key }: DocumentRules,
  { end, dtype }: TokenRules,
): TokenizedBlock {
  const ids: number[] = [];
  const lengths: number[] = [];
  let [empty, textBytes] = [0, 0];
  for (const source of sources)
    for (const text of textsOf(source, key)) {
      const begin = ids.length;
      tokenizer.encode(text, ids);
      if (ids.length === begin) {
        empty++;
        continue;
      }
      if (end !== undefined) ids.push(end);
      lengths.push(ids.length - begin);
      textBytes += Buffer.byteLength(text);
    }
  const numbers = dtype === "u16" ? Uint16Array.from(ids) : Int32Array.from(ids);
  return { ids: new Uint8Array(numbers.buffer), lengths: Int32Array.from(lengths), empty, textBytes };
}

/** JSON may hold halves of surrogate pairs, which have no UTF-8. */
const wellFormed = (text: string): string => text.replace(/\p{Cs}/gu, "\ufffd");

function* textsOf(source: DocumentSource, key: string): Generator<string> {
  if (source.kind === "texts") return yield* source.texts.map((text) => wellFormed(text));
  const { path, line, bytes } = source;
  const text = decoded(bytes, path, line);
  if (source.kind === "file") yield text;
  else if (source.kind === "blank-line")
    yield* text
      .split(/\n(?:[^\S\n]*\n)+/)
      .map((part) => part.replace(/^\s*\n|\s+$/g, ""))
      .filter((part) => part !== "");
  else
    for (const [i, written] of linesOf(text).entries()) {
      const one = written.endsWith("\r") ? written.slice(0, -1) : written;
      if (source.kind === "line") yield one;
      else if (one.trim() !== "") yield textOfRecord(one, key, `${path}:${line + i}`);
    }
}

/** The last line end ends a line: no empty one follows. */
const linesOf = (text: string): string[] => text.replace(/\n$/, "").split("\n");

function decoded(bytes: Uint8Array, path: string, line: number): string {
  const wrong = invalidUtf8(bytes, { first: true, last: true });
  if (wrong !== undefined) {
    const at = line + Buffer.from(bytes.subarray(0, wrong)).toString("latin1").split("\n").length - 1;
    const byte = (bytes[wrong] ?? 0).toString(16).padStart(2, "0");
    throw new Trouble(
      `${path}:${at}: the line is no UTF-8: it has the byte 0x${byte}`,
      `write the file as UTF-8: iconv -f ISO-8859-1 -t UTF-8 ${path} > corpus.txt`,
    );
  }
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString();
  return line === 1 && text.startsWith("\ufeff") ? text.slice(1) : text;
}

function textOfRecord(line: string, key: string, place: string): string {
  let record: unknown;
  try {
    record = JSON.parse(line);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new Trouble(`${place}: the line is no JSON: ${printable(why)}`, "each line holds one record: repair the line, or delete it");
  }
  const isRecord = typeof record === "object" && record !== null && !Array.isArray(record);
  const text: unknown = isRecord ? Reflect.get(Object(record), key) : undefined;
  if (typeof text === "string") return wellFormed(text);
  const keys = isRecord ? Object.keys(Object(record)) : [];
  const has = !isRecord
    ? "the line is no record"
    : text !== undefined
      ? `the record's "${key}" is no text`
      : `the record has no "${printable(key)}"`;
  throw new Trouble(
    `${place}: ${has}${keys.length > 0 ? `; its keys are ${printable(keys.join(", "))}` : ""}`,
    "name the key of the text: --key NAME",
  );
}
