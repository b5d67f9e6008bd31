/**
 * Reads corpora as blocks of whole documents: text, JSON lines, and Parquet, also compressed with gzip or zstd. A block goes to a worker;
 * where blocks end depends on the files alone. A position within a file counts decompressed bytes, or rows of Parquet.
 */
import { Readable } from "node:stream";
import { createGunzip } from "node:zlib";
import { Decompress } from "fzstd";
import { parquetMetadataAsync, parquetReadObjects } from "hyparquet";
import { compressors } from "hyparquet-compressors";
import { Trouble } from "../../../schemas/trouble.ts";
import { formatOf, HEAD } from "../fileFormat.ts";
import { type InputFile, openInput } from "../inputFile.ts";

/** What separates the documents of a text: nothing, blank lines, or line ends. */
export type DocumentBorder = "file" | "blank-line" | "line";
/** How the text of a file is found. */
export interface DocumentRules {
  readonly border: DocumentBorder;
  /** The key of a JSON record, or the column of a Parquet file, that has the text. */
  readonly key: string;
}
/** A place from which reading goes on. */
export interface CorpusPosition {
  readonly file: number;
  /** Bytes after decompression; rows of Parquet. */
  readonly at: number;
  /** The number of line ends before `at`. */
  readonly lines: number;
}
/** Whole documents of one file. `line`: the number of the first line, from 1; of Parquet the number of the first row. */
export type DocumentSource = { readonly path: string; readonly line: number } & (
  | { readonly kind: "json" | DocumentBorder; readonly bytes: Uint8Array<ArrayBuffer> }
  | { readonly kind: "texts"; readonly texts: readonly string[] }
);
/** What a worker tokenizes at once. `after`: where the next block begins; `read`: compressed bytes read so far of `after.file`. */
export interface DocumentBlock {
  readonly sources: readonly DocumentSource[];
  readonly after: CorpusPosition;
  readonly read: number;
}

/** A block has at least this many bytes, but for the last: enough that messages cost little, small enough for even work. */
const BLOCK = 2 ** 20;
/** A document must fit into one string of JavaScript, with room for its tokens. */
const LONGEST = 2 ** 28;

/** Reads the blocks of files from a position on. Throws a Trouble that names file and line. */
export async function* documentBlocks(paths: readonly string[], rules: DocumentRules, from: CorpusPosition): AsyncGenerator<DocumentBlock> {
  let sources: DocumentSource[] = [];
  let size = 0;
  for (const [file, path] of paths.entries()) {
    if (file < from.file) continue;
    const start = file === from.file ? from : { at: 0, lines: 0 };
    const input = openInput(path, "the corpus", "paths start at the current folder");
    try {
      for await (const { source, at, lines, read } of sourcesOf(input, rules, start)) {
        sources.push(source);
        size += source.kind === "texts" ? source.texts.reduce((sum, { length }) => sum + length, 0) : source.bytes.length;
        if (size < BLOCK) continue;
        yield { sources, after: { file, at, lines }, read };
        [sources, size] = [[], 0];
      }
      const last = file + 1 === paths.length;
      if (last) yield { sources, after: { file: paths.length, at: 0, lines: 0 }, read: 0 };
    } finally {
      input.close();
    }
  }
}

type SourceStep = { readonly source: DocumentSource; readonly at: number; readonly lines: number; readonly read: number };

async function* sourcesOf(input: InputFile, rules: DocumentRules, start: { at: number; lines: number }): AsyncGenerator<SourceStep> {
  const { path } = input;
  const reader = readerOf(path);
  if (reader === "parquet") return yield* parquetSources(input, rules.key, start.at);
  const kind = reader === "json" ? "json" : rules.border;
  expectReadable(input, kind === "json");
  let { at, lines } = start;
  for await (const { bytes, read } of cutAt(plainBytes(input, at), kind, path)) {
    const line = lines + 1;
    // the bytes belong to the worker once they are out
    at += bytes.length;
    lines += lineEnds(bytes);
    yield { source: { kind, path, line, bytes }, at, lines, read };
  }
}

/** Returns the reader of a file, which its name decides. */
function readerOf(path: string): "parquet" | "json" | "text" {
  const name = path.replace(/\.(gz|zst)$/i, "");
  return /\.parquet$/i.test(name) ? "parquet" : /\.(jsonl|ndjson|json)$/i.test(name) ? "json" : "text";
}

/** Returns whether a file that is read as text has JSON records: its first line is one, with a string in it. */
export async function hasJsonLines(path: string): Promise<boolean> {
  if (readerOf(path) !== "text") return false;
  const input = openInput(path, "the corpus", "paths start at the current folder");
  try {
    for await (const { bytes } of plainBytes(input, 0))
      return isRecord(Buffer.from(bytes).toString("utf8").trimStart().split("\n", 1)[0] ?? "");
  } finally {
    input.close();
  }
  return false;
}
function isRecord(line: string): boolean {
  if (!line.startsWith("{")) return false;
  try {
    return Object.values(JSON.parse(line) as object).some((value) => typeof value === "string");
  } catch {
    return false;
  }
}

function expectReadable(input: InputFile, isJson: boolean): void {
  const head = new Uint8Array(Math.min(HEAD, input.bytes));
  input.read(head, 0);
  const found = formatOf(input.path, head);
  if (!found || ["gzip", "zstd"].includes(found.name) || (isJson && found.name === "JSON")) return;
  throw new Trouble(
    `${input.path}: the corpus looks like ${found.name}; rankc reads text, .jsonl and .parquet, also as .gz and .zst`,
    found.fix,
  );
}

function lineEnds(bytes: Uint8Array): number {
  let count = 0;
  for (let i = bytes.indexOf(10); i >= 0; i = bytes.indexOf(10, i + 1)) count++;
  return count;
}

type Chunk = { readonly bytes: Uint8Array; readonly read: number };

/** Joins chunks and cuts them where a document ends, into parts of about one block. A file that is one document is one part. */
async function* cutAt(
  chunks: AsyncIterable<Chunk>,
  kind: DocumentSource["kind"],
  path: string,
): AsyncGenerator<Chunk & { readonly bytes: Uint8Array<ArrayBuffer> }> {
  let rest: Uint8Array[] = [];
  let size = 0;
  let last = 0;
  const joined = (): Uint8Array<ArrayBuffer> => {
    const whole = new Uint8Array(size);
    let at = 0;
    for (const part of rest) {
      whole.set(part, at);
      at += part.length;
    }
    return whole;
  };
  for await (const { bytes, read } of chunks) {
    rest.push(bytes);
    size += bytes.length;
    last = read;
    if (size > LONGEST)
      throw new Trouble(
        `${path}: a document has more than ${LONGEST / 2 ** 20} MiB`,
        kind === "file" ? "say what separates its documents: --documents line or blank-line" : "cut the document into several",
      );
    // a document that began in an earlier chunk ends in this one, or the search of a border would be quadratic
    if (kind === "file" || size < BLOCK || bytes.indexOf(10) < 0) continue;
    const whole = joined();
    const end = lastBorder(whole, kind);
    if (end > 0) yield { bytes: whole.slice(0, end), read };
    rest = [whole.subarray(end)];
    size -= end;
  }
  if (size > 0) yield { bytes: joined(), read: last };
}

/** Where the last whole document of the bytes ends; 0 if none does. */
function lastBorder(bytes: Uint8Array, kind: DocumentSource["kind"]): number {
  if (kind !== "blank-line") return bytes.lastIndexOf(10) + 1;
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [unix, dos] = [text.lastIndexOf("\n\n"), text.lastIndexOf("\n\r\n")];
  return Math.max(unix < 0 ? 0 : unix + 2, dos < 0 ? 0 : dos + 3);
}

/** Reads the decompressed bytes of a file, without the first `skip`. */
async function* plainBytes(input: InputFile, skip: number): AsyncGenerator<Chunk> {
  const head = new Uint8Array(Math.min(4, input.bytes));
  input.read(head, 0);
  const isGzip = head[0] === 0x1f && head[1] === 0x8b;
  const isZstd = head[0] === 0x28 && head[1] === 0xb5 && head[2] === 0x2f && head[3] === 0xfd;
  if (!isGzip && !isZstd) {
    for (const chunk of rawBytes(input, skip)) yield { bytes: chunk.bytes, read: chunk.read };
    return;
  }
  let read = 0;
  const counted = function* () {
    for (const chunk of rawBytes(input, 0)) {
      read = chunk.read;
      yield chunk.bytes;
    }
  };
  let left = skip;
  for await (const bytes of isGzip ? gunzipped(counted(), input.path) : unzstd(counted(), input.path)) {
    const dropped = Math.min(left, bytes.length);
    left -= dropped;
    if (dropped < bytes.length) yield { bytes: bytes.subarray(dropped), read };
  }
}

function* rawBytes(input: InputFile, from: number): Generator<Chunk> {
  for (let at = from; at < input.bytes; ) {
    const bytes = new Uint8Array(Math.min(BLOCK, input.bytes - at));
    input.read(bytes, at);
    at += bytes.length;
    yield { bytes, read: at };
  }
}

const damaged = (path: string, why: string): Trouble =>
  new Trouble(`${path}: the compressed corpus is damaged or cut: ${why}`, "copy the file again");

async function* gunzipped(chunks: Iterable<Uint8Array>, path: string): AsyncGenerator<Uint8Array> {
  const plain = Readable.from(chunks).pipe(createGunzip());
  try {
    for await (const bytes of plain) yield bytes;
  } catch (error) {
    throw error instanceof Trouble ? error : damaged(path, error instanceof Error ? error.message : String(error));
  }
}

function* unzstd(chunks: Iterable<Uint8Array>, path: string): Generator<Uint8Array> {
  let ready: Uint8Array[] = [];
  const stream = new Decompress((bytes) => ready.push(bytes.slice()));
  const push = (bytes: Uint8Array, final: boolean): void => {
    try {
      stream.push(bytes, final);
    } catch (error) {
      throw damaged(path, error instanceof Error ? error.message : String(error));
    }
  };
  for (const chunk of chunks) {
    push(chunk, false);
    yield* ready;
    ready = [];
  }
  push(new Uint8Array(), true);
  yield* ready;
}

/** Rows of a Parquet file at a time: a row group may have a GiB. */
const ROWS = 4096;

async function* parquetSources(input: InputFile, key: string, from: number): AsyncGenerator<SourceStep> {
  const { path } = input;
  const slice = async (start: number, end = input.bytes): Promise<ArrayBuffer> => {
    const bytes = new Uint8Array(end - start);
    input.read(bytes, start);
    return bytes.buffer;
  };
  const file = { byteLength: input.bytes, slice };
  const attempt = async <T>(work: () => Promise<T>): Promise<T> => {
    try {
      return await work();
    } catch (error) {
      if (error instanceof Trouble) throw error;
      throw new Trouble(
        `${path}: the Parquet file cannot be read: ${error instanceof Error ? error.message : String(error)}`,
        "check the file, for example with pyarrow",
      );
    }
  };
  const metadata = await attempt(() => parquetMetadataAsync(file));
  const columns = metadata.schema.slice(1).map(({ name }) => name);
  if (!columns.includes(key))
    throw new Trouble(
      `${path}: the file has no column ${key}; it has ${columns.join(", ")}`,
      `name the column of the text: --key ${columns[0] ?? "NAME"}`,
    );
  const rows = Number(metadata.num_rows);
  for (let at = from; at < rows; ) {
    const end = Math.min(rows, at + ROWS);
    const records = await attempt(() => parquetReadObjects({ file, metadata, columns: [key], rowStart: at, rowEnd: end, compressors }));
    const texts = records.map((record, i) => {
      const text: unknown = record[key];
      if (typeof text === "string") return text;
      throw new Trouble(
        `${path}: row ${at + i + 1}: the column ${key} holds ${text === null ? "null" : typeof text}, not a text`,
        "name the column of the text with --key",
      );
    });
    yield { source: { kind: "texts", path, line: at + 1, texts }, at: end, lines: 0, read: Math.round((input.bytes * end) / rows) };
    at = end;
  }
}
