/**
 * Prepares a data set for training: reads corpora, tokenizes their documents on all cores, and writes them in Megatron's indexed format
 * (PREFIX.bin, PREFIX.idx) with a description (PREFIX.json). The bytes depend on corpora and settings alone, not on the number of threads.
 */
import { createHash } from "node:crypto";
import { resolve } from "node:path";
import { datasetPrefix } from "../../../schemas/dataFiles.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { fileStamp, isThere, listFiles, readWhole } from "../inputFile.ts";
import { openTokenizer } from "../tokenizers/openTokenizer.ts";
import type { Tokenizer } from "../tokenizers/tokenizer.ts";
import type { DatasetDescription } from "./description.ts";
import { type DocumentBlock, type DocumentRules, documentBlocks, hasJsonLines } from "./documents.ts";
import { idTypeOf } from "./indexFile.ts";
import { PartialDataset } from "./partialDataset.ts";
import type { TokenizedBlock } from "./tokenizeBlock.ts";
import { openTokenizePool } from "./worker.ts";

/** What `rankc data prepare` is asked for. */
export interface PrepareSettings {
  /** Files and folders; of a folder all files below it with a known ending, by name. */
  readonly inputs: readonly string[];
  readonly prefix: string;
  readonly tokenizer: string;
  readonly encoding?: string | undefined;
  readonly documents: DocumentRules;
  /** The end of a document: a token, an id, or `none`. Default: what the tokenizer's files name. */
  readonly end?: string | undefined;
  readonly threads: number;
  readonly restart: boolean;
  readonly overwrite: boolean;
  /** Stops after the current block; a later call goes on there. */
  readonly signal: AbortSignal;
  readonly onProgress: (progress: PrepareProgress) => void;
  /** Receives what is probably a mistake, before the work starts. */
  readonly onWarning?: (warning: string) => void;
}
/** Where the work stands. `share`: of the bytes of all corpora. */
export interface PrepareProgress {
  readonly share: number;
  readonly documents: number;
  readonly tokens: number;
  readonly textBytes: number;
  /** Since this call began. */
  readonly seconds: number;
  /** The share at which this call began. */
  readonly from: number;
}
/** What was written. */
export interface Prepared extends DatasetDescription {
  readonly prefix: string;
  readonly seconds: number;
  /** Whether the call was stopped before the end. */
  readonly stopped: boolean;
}

/** Progress is recorded on the disk this often, in milliseconds. */
const RECORD = 5000;

/** Prepares a data set, or goes on with one. Throws a Trouble; what was written until then is kept for the next call. */
export async function prepareDataset(settings: PrepareSettings): Promise<Prepared> {
  const { tokenizer: name, encoding, documents, overwrite, threads, signal } = settings;
  const prefix = prefixOf(settings.prefix);
  if (!overwrite && isThere(`${prefix}.idx`))
    throw new Trouble(`${prefix}.idx exists already`, "name another data set after -o, or add --overwrite");
  const tokenizer = openTokenizer(name, encoding);
  const end = endOf(tokenizer, name, settings.end);
  const vocab = Math.max(tokenizer.vocab, (end ?? 0) + 1);
  const dtype = idTypeOf(vocab);
  const paths = corporaOf(settings.inputs);
  for (const path of paths)
    if (await hasJsonLines(path))
      settings.onWarning?.(
        `${path}: its first line is a JSON record, but its name is that of a text: keys and quotes become tokens, too. Rename it to .jsonl to use the text of each record`,
      );
  const stamps = paths.map(fileStamp);
  const tokenizerDigest = name === "bytes" ? "" : createHash("sha256").update(digestOf(name)).digest("hex");
  const partial = new PartialDataset(
    prefix,
    {
      ...{ tokenizer: tokenizerDigest || "bytes", encoding: encoding ?? "", "end of documents": String(end ?? "none") },
      ...{ "--documents": documents.border, "--key": documents.key, "list of corpora": String(paths.length) },
      ...Object.fromEntries(paths.map((path, i) => [path, `${stamps[i]?.bytes} ${stamps[i]?.changed}`])),
    },
    settings.restart,
  );
  const pool = openTokenizePool({ tokenizer: name, encoding, documents, tokens: { end, dtype } }, threads);
  const begun = performance.now();
  const before = startsOf(stamps.map(({ bytes }) => bytes));
  const shareOf = (file: number, read: number): number => ((before[file] ?? 0) + read) / Math.max(1, before.at(-1) ?? 1);
  const width = dtype === "u16" ? 2 : 4;
  const seconds = (): number => (performance.now() - begun) / 1000;
  try {
    const from = shareOf(partial.progress.after.file, 0);
    let recorded = performance.now();
    const take = ({ after, read }: DocumentBlock, { ids, lengths, empty, textBytes }: TokenizedBlock): void => {
      const was = partial.progress;
      partial.append(ids, lengths, {
        ...{ after, idBytes: was.idBytes + ids.length, documents: was.documents + lengths.length },
        ...{ empty: was.empty + empty, textBytes: was.textBytes + textBytes },
      });
      if (performance.now() - recorded > RECORD) {
        partial.record();
        recorded = performance.now();
      }
      const now = partial.progress;
      settings.onProgress({
        ...{ share: shareOf(after.file, read), documents: now.documents, tokens: now.idBytes / width, textBytes: now.textBytes },
        ...{ seconds: seconds(), from },
      });
    };
    await inOrder(
      documentBlocks(paths, documents, partial.progress.after),
      ({ sources }) => pool.tokenize(sources),
      take,
      2 * threads,
      signal,
    );
    const { documents: count, idBytes, empty, textBytes } = partial.progress;
    const stopped = partial.progress.after.file < paths.length;
    const described: DatasetDescription = {
      ...{ tokenizer: name === "bytes" ? name : resolve(name), tokenizer_sha256: tokenizerDigest, ...(encoding && { encoding }) },
      ...{ kind: tokenizer.kind, vocab, end_of_document: end ?? null, dtype, documents: count, empty_documents: empty },
      ...{ tokens: idBytes / width, text_bytes: textBytes, inputs: paths },
    };
    if (!stopped && count === 0)
      throw new Trouble("the corpora have no documents with text", "see that the files and --key are the right ones");
    if (stopped) partial.pause();
    else partial.finish(dtype, `${JSON.stringify(described, null, 2)}\n`);
    return { ...described, prefix, seconds: seconds(), stopped };
  } catch (error) {
    partial.abandon();
    throw error;
  } finally {
    await pool.close();
  }
}

/** Returns the prefix that inspect and data.sources read a name as. Throws a Trouble if it names no file. */
function prefixOf(name: string): string {
  const prefix = datasetPrefix(name);
  if (/(^|\/)\.{0,2}$/.test(prefix) || prefix.includes("\0"))
    throw new Trouble(
      `${JSON.stringify(name)} is no prefix of file names`,
      "add a name: -o data/corpus writes data/corpus.bin and data/corpus.idx",
    );
  return prefix;
}

/** Returns the corpora that files and folders hold. Throws a Trouble if there are none. */
function corporaOf(inputs: readonly string[]): string[] {
  const paths = inputs.flatMap((input) => listFiles(input, /\.(txt|md|rst|text|jsonl|ndjson|parquet)(\.gz|\.zst)?$|\.json\.(gz|zst)$/i));
  if (paths.length === 0)
    throw new Trouble("the folders hold no corpora", "name the files, or folders with .txt, .md, .rst, .jsonl or .parquet");
  return paths;
}

/** The bytes by which a tokenizer is recognized. */
const digestOf = (path: string): Uint8Array => readWhole(listFiles(path, /^tokenizer\.(json|model)$/)[0] ?? path, "the tokenizer");

/** Running sums that begin at 0. */
function startsOf(sizes: readonly number[]): number[] {
  const starts = [0];
  for (const size of sizes) starts.push((starts.at(-1) ?? 0) + size);
  return starts;
}

/** Works on up to `most` items at once and takes the results in the order of the items. Of several errors the first item's is thrown. */
async function inOrder<T, R>(
  items: AsyncGenerator<T>,
  work: (item: T) => Promise<R>,
  take: (item: T, result: R) => void,
  most: number,
  signal: AbortSignal,
): Promise<void> {
  const waiting: { readonly item: T; readonly result: Promise<R> }[] = [];
  const takeFirst = async (): Promise<void> => {
    const first = waiting.shift();
    if (first) take(first.item, await first.result);
  };
  try {
    for await (const item of items) {
      if (signal.aborted) break;
      const result = work(item);
      // the error is thrown when its turn comes
      result.catch(() => {});
      waiting.push({ item, result });
      if (waiting.length >= most) await takeFirst();
    }
  } catch (error) {
    // the reader is ahead of the workers: an error of an earlier block is the first
    while (waiting.length > 0) await takeFirst();
    throw error;
  }
  while (waiting.length > 0) await takeFirst();
}

/** Common names of the token that ends a document. */
const endTokens = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end_of_sentence|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"];

function endOf(tokenizer: Tokenizer, name: string, wanted: string | undefined): number | undefined {
  if (wanted === "none") return undefined;
  if (wanted !== undefined) {
    const id = tokenizer.idOf(wanted) ?? (/^\d+$/.test(wanted) ? Number(wanted) : undefined);
    if (id !== undefined && id < 2 ** 31) return id;
    throw new Trouble(`${name}: the tokenizer has no token ${JSON.stringify(wanted)}`, "name a token or an id after --eod, or --eod none");
  }
  if (tokenizer.end !== undefined) return tokenizer.end;
  const known = endTokens.flatMap((token) => tokenizer.idOf(token) ?? []);
  if (known.length === 1) return known[0];
  throw new Trouble(
    `${name === "bytes" ? "the tokenizer bytes" : name} does not say which token ends a document`,
    name === "bytes"
      ? "add --eod none; --eod 0, the byte that no text has; or --eod 256, and set model.vocab to 257 or more"
      : "name it: --eod TOKEN or --eod ID; or add --eod none",
  );
}
