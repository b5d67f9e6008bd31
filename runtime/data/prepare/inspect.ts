/** What `rankc data inspect` shows of a data set. */
import { datasetPrefix } from "../../../schemas/dataFiles.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { isThere, openInput } from "../inputFile.ts";
import { readIndex, readLengths } from "../megatronIndex.ts";
import { openTokenizer } from "../tokenizers/openTokenizer.ts";
import { idsOf } from "../tokens.ts";
import { type DatasetDescription, readDescription } from "./description.ts";

/** A data set: its size, the lengths of its documents in tokens, and the beginnings of some documents. */
export interface InspectedDataset {
  readonly prefix: string;
  readonly dtype: string;
  readonly documents: number;
  readonly sequences: number;
  readonly tokens: number;
  readonly bytes: number;
  readonly lengths: { readonly least: number; readonly median: number; readonly mean: number; readonly p90: number; readonly most: number };
  /** The content of PREFIX.json, if rankc prepared the data set. */
  readonly description?: DatasetDescription | undefined;
  /** Ids of the beginnings; `text` if a tokenizer is known. */
  readonly samples: readonly { readonly document: number; readonly ids: readonly number[]; readonly text?: string | undefined }[];
}

/** Reads a data set. `tokenizer`: default: the one of its description. Throws a Trouble if the files are damaged. */
export function inspectDataset(
  given: string,
  settings: {
    readonly tokenizer?: string | undefined;
    readonly encoding?: string | undefined;
    readonly samples: number;
    readonly tokens: number;
  },
): InspectedDataset {
  const prefix = datasetPrefix(given);
  if (!isThere(`${prefix}.idx`))
    throw new Trouble(
      `${prefix}.idx does not exist`,
      isThere(`${prefix}.partial`)
        ? "the data set is not finished: repeat the command that prepares it"
        : "name the prefix of a data set: PREFIX of PREFIX.bin and PREFIX.idx",
    );
  const [bin, idx] = [
    openInput(`${prefix}.bin`, "the data set", "check the path"),
    openInput(`${prefix}.idx`, "the index of the data set", "check the path"),
  ];
  try {
    const index = readIndex(idx);
    const lengths = readLengths(idx, index);
    const description = readDescription(prefix);
    const ids = idsOf(bin, { format: "tokens", dtype: "u32", vocab: 2 ** 31 }, index);
    const named = settings.tokenizer ?? description?.tokenizer;
    // the tokenizer of a description may be on another machine
    const tokenizer =
      named === undefined || (settings.tokenizer === undefined && named !== "bytes" && !isThere(named))
        ? undefined
        : openTokenizer(named, settings.encoding ?? description?.encoding);
    const sorted = lengths.slice().sort();
    const at = (share: number): number => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? 0;
    const starts = Float64Array.from(lengths);
    let start = 0;
    for (const [i, length] of lengths.entries()) {
      starts[i] = start;
      start += length;
    }
    const shown = Math.min(settings.samples, lengths.length);
    const samples = Array.from({ length: shown }, (_, k) => {
      const document = Math.floor((k * lengths.length) / shown);
      const some = new Int32Array(Math.min(settings.tokens, lengths[document] ?? 0));
      ids.read(some, starts[document] ?? 0);
      return {
        document,
        ids: [...some],
        ...(tokenizer && { text: textOf(some, tokenizer.decode, description?.end_of_document ?? undefined) }),
      };
    });
    return {
      ...{ prefix, dtype: index.dtype, documents: index.documents, sequences: lengths.length, tokens: index.count, bytes: bin.bytes },
      lengths: { least: sorted[0] ?? 0, median: at(0.5), mean: index.count / lengths.length, p90: at(0.9), most: sorted.at(-1) ?? 0 },
      ...(description && { description }),
      samples,
    };
  } finally {
    bin.close();
    idx.close();
  }
}

/** The end of a document may be above the vocabulary of the tokenizer, as with bytes. */
const textOf = (ids: Int32Array, decode: (ids: Iterable<number>) => string, end: number | undefined): string =>
  decode(ids.at(-1) === end ? ids.subarray(0, -1) : ids);
