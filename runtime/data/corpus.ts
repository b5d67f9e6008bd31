/** Opens the corpus of a job on disk: tokens, optional index and labels, and batches of them. */
import { indexPath } from "../../schemas/dataFiles.ts";
import type { HeldOutPart } from "../../schemas/heldOut.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type BatchOf, batchesOf, type Corpus, type Reading, tokensOf } from "../train/inputs.ts";
import { invalidUtf8 } from "./fileFormat.ts";
import { splitBounds } from "./gptDataset.ts";
import type { HeldOutSource } from "./heldOut.ts";
import { type InputFile, isThere, openInput } from "./inputFile.ts";
import { openTokenizer } from "./tokenizers/openTokenizer.ts";
import type { Text } from "./tokens.ts";

/** An open corpus. */
export type Opened = { readonly batch: BatchOf; readonly close: () => void };
/** An open corpus whose split holds data out. */
export type OpenedCorpus = Opened & {
  /** Returns the source of a held-out part of data.split. */
  heldOut(part: HeldOutPart): HeldOutSource;
};

/** Absolute paths of `data`. `tokenizer`: of a text that is not read as bytes. */
export interface CorpusPaths {
  readonly path: string;
  readonly labels?: string | undefined;
  readonly tokenizer?: string | undefined;
}

/** The longest text in bytes that is tokenized when a run opens it: some 20 s of one core, on every start of every rank. */
const TOKENIZED = 2 ** 25;

/**
 * Opens the files of `data.path` and `data.labels`, and PREFIX.idx where the ids of PREFIX.bin have one. Throws a Trouble if one is missing
 * or cannot be read, if a text is too long to be tokenized now, or as `batchesOf` does.
 */
export function openCorpus({ path, labels, tokenizer }: CorpusPaths, reading: Reading): OpenedCorpus {
  const open: { close(): void }[] = [];
  const openAt = (at: string, what: string, key: string) => {
    expectPlainPath(at, what, key);
    const file = openInput(at, what, `${key} starts at the folder of the job or plan; --data-dir names another`);
    open.push(file);
    return file;
  };
  const close = (): void => {
    for (const file of open) file.close();
  };
  try {
    const ids = openAt(path, "the corpus", "data.path");
    const beside = reading.format === "tokens" ? indexPath(path) : undefined;
    const index = beside !== undefined && isThere(beside) ? openAt(beside, "the index of the corpus", "data.path") : undefined;
    const marks = labels === undefined ? undefined : openAt(labels, "the file of labels", "data.labels");
    const asText = tokenizer === undefined || reading.format !== "text";
    const how: Reading = asText ? reading : { ...reading, format: "tokens", dtype: "u32" };
    const corpus = asText ? { ids, index, labels: marks } : { ids: tokenized(ids, tokenizer, reading.vocab), labels: marks };
    return { batch: batchesOf(corpus, how), heldOut: (part) => heldOutText(corpus, part, how), close };
  } catch (error) {
    close();
    throw error;
  }
}

/** Returns the tokens of a share of a corpus as a source of an evaluation. Throws a Trouble if it has none to predict. */
function heldOutText(corpus: Corpus, part: HeldOutPart, reading: Reading): HeldOutSource {
  const { seq, split = [1] } = reading;
  const tokens = tokensOf(corpus, reading);
  const share = part === "validation" ? 1 : 2;
  const [from = 0, to = from] = splitBounds(split, tokens.count).slice(share);
  const once = Math.ceil(Math.max(0, to - from - 1) / seq);
  if (once === 0)
    throw new Trouble(
      `${tokens.path}: the ${part} share of data.split has ${to - from} of ${tokens.count} ${tokens.unit}`,
      `use a longer corpus, or give ${part} a larger share in data.split`,
    );
  const whole = (n: number, window: Int32Array): number => {
    const begin = from + n * seq;
    const count = Math.min(seq + 1, to - begin);
    tokens.read(window.subarray(0, count), begin);
    return count;
  };
  const windows = Math.floor((to - from - 1) / seq);
  if (windows === 0 && reading.evaluates !== "all")
    throw new Trouble(
      `${tokens.path}: the ${part} share of data.split has ${to - from} of ${tokens.count} ${tokens.unit}; a sample needs ${seq + 1}`,
      `set train.evaluation.steps to all, use a longer corpus, or give ${part} a larger share in data.split`,
    );
  return { name: tokens.path, weight: 1, once, whole, sample: (n, window) => void whole(n % windows, window) };
}

/** Tokenizes a text; returns its ids as a file of u32 in memory. */
function tokenized(file: InputFile, path: string, vocab: number): Text {
  if (file.bytes > TOKENIZED)
    throw new Trouble(
      `${file.path}: the corpus has ${file.bytes} bytes; a run tokenizes texts up to ${TOKENIZED}`,
      `prepare it once: rankc data prepare ${file.path} -t ${path} -o PREFIX, then name PREFIX in data.sources`,
    );
  const bytes = new Uint8Array(file.bytes);
  file.read(bytes, 0);
  const wrong = invalidUtf8(bytes, { first: true, last: true });
  if (wrong !== undefined)
    throw new Trouble(
      `${file.path}: the corpus is no UTF-8 text at byte ${wrong}`,
      `write it as UTF-8: iconv -f ISO-8859-1 -t UTF-8 ${file.path}`,
    );
  const tokenizer = openTokenizer(path);
  if (tokenizer.vocab > vocab)
    throw new Trouble(
      `${path}: the tokenizer has ${tokenizer.vocab} ids, and model.vocab is ${vocab}`,
      `set model.vocab to ${tokenizer.vocab} or more`,
    );
  const ids: number[] = [];
  tokenizer.encode(Buffer.from(bytes).toString(), ids);
  const whole = new Uint8Array(Uint32Array.from(ids).buffer);
  return { path: file.path, bytes: whole.length, read: (into, at) => into.set(whole.subarray(at, at + into.length)) };
}

/** Ways in which other tools name data, and what to write here. A path was made absolute, which leaves one slash of a URL's two. */
const namings: readonly { readonly pattern: RegExp; readonly found: string; readonly fix: string }[] = [
  {
    pattern: /(^|\/)[a-z][a-z0-9+.-]+:\/(?!$)/i,
    ...{ found: "is a URL", fix: "download the file, and name the copy on the disk" },
  },
  {
    pattern: /(^|\/)(\d*\.)?\d+\s+\S+\s+(\d*\.)?\d+\s+\S/,
    ...{ found: "is a blend of data sets", fix: "list its data sets with their weights in data.sources" },
  },
  {
    pattern: /[*?]|\[[^\]]+\]|\{[^}]*,[^}]*\}/,
    ...{ found: "is a pattern of names", fix: "rankc reads one file: join the files first, for example cat part-*.txt > corpus.txt" },
  },
  { pattern: /(^|\/)~[^/]*\//, ...{ found: "begins with ~, which only a shell replaces", fix: "write the path of the directory" } },
];

/** Throws a Trouble if a path that does not exist has a form that other tools accept. */
function expectPlainPath(path: string, what: string, key: string): void {
  if (isThere(path)) return;
  for (const end of ["", "_text_document", "_text_sentence", "_document"])
    if (isThere(`${path}${end}.bin`))
      throw new Trouble(
        `${path}: ${what} is named by the prefix of a Megatron data set`,
        `name the file of its ids in ${key}: ${path}${end}.bin`,
      );
  const naming = namings.find(({ pattern }) => pattern.test(path));
  if (naming) throw new Trouble(`${path}: ${what} ${naming.found}, and no such file exists`, naming.fix);
}
