/** Opens the sources of a job: data sets in Megatron's indexed format, their samples blended by weight. */
import { datasetPrefix } from "../../schemas/dataFiles.ts";
import type { HeldOutPart } from "../../schemas/heldOut.ts";
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { batchesFrom, type Reading } from "../train/inputs.ts";
import { blendOf } from "./blend.ts";
import type { Opened } from "./corpus.ts";
import { documentsOfSources } from "./documents.ts";
import { type DocumentPiece, gptSamples, splitBounds, wholeSamples } from "./gptDataset.ts";
import type { HeldOutSource } from "./heldOut.ts";
import { type InputFile, isThere, openInput } from "./inputFile.ts";
import { readIndex, readLengths } from "./megatronIndex.ts";
import { readDescription } from "./prepare/description.ts";
import { type Index, idsOf } from "./tokens.ts";

/** A part of a data set: shuffled samples without end, and the samples of its documents in their order. */
interface OpenSource {
  readonly prefix: string;
  /** The token that ends a document, if the description of the data set names one. */
  readonly end: number | undefined;
  /** Fills a window of seq + 1 tokens with sample n. */
  sample(n: number, window: Int32Array): void;
  /** Samples that hold each token once; the last may be short. */
  readonly once: number;
  whole(n: number, window: Int32Array): number;
}
type Source = NonNullable<Job["data"]["sources"]>[number];

/** Which documents of a source are read: those of training, validation or test. */
interface Part {
  /** The key of the job that lists the sources. */
  readonly key: "data.sources" | "data.validation" | "data.test";
  readonly split?: readonly number[] | undefined;
  /** The number of the share. */
  readonly share: 0 | 1 | 2;
  readonly name: "training" | HeldOutPart;
}

/**
 * Opens the sources of `data.sources` with absolute paths. `split`: with shares of training, validation and test; the samples are those of
 * training. A batch is a function of the number of sequences before it, so it does not depend on the mesh or on earlier batches. Throws a
 * Trouble if a source is missing, damaged, or does not fit the vocabulary.
 */
export function openSources(sources: readonly Source[], split: readonly number[] | undefined, reading: Reading): Opened {
  const { opened: readers, close } = openAll(sources, { key: "data.sources", split, share: 0, name: "training" }, reading);
  const sampleOf = blendOf(sources.map(({ weight }) => weight));
  const documents = documentsOfSources(
    reading.documents,
    readers.map(({ prefix, end }) => ({ name: prefix, end })),
  );
  const batch = batchesFrom({ ...reading, documents }, ({ first, row }, window) => {
    const { source, index } = sampleOf(first + row);
    readers[source]?.sample(index, window);
    return undefined;
  });
  return { batch, close };
}

/** Opens the sources of validation or test data: a share of the sources of training, or with `own` data sets listed for it. */
export function openHeldOutSources(
  sources: readonly Source[],
  { part, own, split }: { readonly part: HeldOutPart; readonly own: boolean; readonly split: readonly number[] | undefined },
  reading: Reading,
): { readonly sources: HeldOutSource[]; readonly close: () => void } {
  const share = part === "validation" ? 1 : 2;
  const from: Part = own ? { key: `data.${part}`, share, name: part } : { key: "data.sources", split, share, name: part };
  const { opened, close } = openAll(sources, from, reading);
  return { sources: opened.map((source, i) => ({ ...source, name: sources[i]?.path ?? "", weight: sources[i]?.weight ?? 1 })), close };
}

function openAll(sources: readonly Source[], part: Part, reading: Reading) {
  const open: { close(): void }[] = [];
  const close = (): void => {
    for (const file of open) file.close();
  };
  try {
    return { opened: sources.map(({ path }, i) => openSource(path, i, part, reading, (file) => open.push(file))), close };
  } catch (error) {
    close();
    throw error;
  }
}

/** Reads an index and closes its file: a blend of hundreds of sources keeps one file open for each. */
function indexAt(file: InputFile): { readonly index: Index; readonly lengths: Int32Array } {
  try {
    const index = readIndex(file);
    return { index, lengths: readLengths(file, index) };
  } finally {
    file.close();
  }
}

function openSource(
  given: string,
  number: number,
  { key: list, split, share, name }: Part,
  { seq, vocab, seed }: Reading,
  opened: (file: { close(): void }) => void,
): OpenSource {
  const prefix = datasetPrefix(given);
  const key = `${list}[${number}]`;
  if (!isThere(`${prefix}.idx`))
    throw new Trouble(
      `${prefix}.idx: the index of ${key} does not exist`,
      "name the prefix of a data set with .bin and .idx, relative to the job or to --data-dir; rankc data prepare writes one",
    );
  const openAt = (path: string) => openInput(path, key, "sources start at the folder of the job or plan; --data-dir names another");
  const described = readDescription(prefix);
  if (described && described.vocab > vocab)
    throw new Trouble(
      `${prefix}: ${key} was prepared with ${described.vocab} ids, and model.vocab is ${vocab}`,
      `set model.vocab to ${described.vocab} or more`,
    );
  const { index, lengths: all } = indexAt(openAt(`${prefix}.idx`));
  const bin = openAt(`${prefix}.bin`);
  opened(bin);
  const tokens = idsOf(bin, { format: "tokens", dtype: "u32", vocab }, index);
  const [from = 0, to = all.length] = split ? splitBounds(split, all.length).slice(share) : [];
  const lengths = all.subarray(from, to);
  const count = lengths.reduce((sum, length) => sum + length, 0);
  // the samples of an evaluation may be shorter, or begin again
  if (count < (share === 0 ? seq + 1 : 2))
    throw new Trouble(
      `${prefix}: the ${name} part of ${key} has ${count} tokens in ${lengths.length} documents; ${share === 0 ? `a sample needs ${seq + 1}` : "an evaluation needs 2"}`,
      share === 0
        ? "use a longer source, lower model.seq, or give training a larger share in data.split"
        : `use a longer source, or give ${name} a larger share in data.split`,
    );
  const starts = new Float64Array(lengths.length);
  let at = all.subarray(0, from).reduce((sum, length) => sum + length, 0);
  for (const [i, length] of lengths.entries()) {
    starts[i] = at;
    at += length;
  }
  const read = (pieces: readonly DocumentPiece[], window: Int32Array): number => {
    let done = 0;
    for (const { document, from: begin, count: length } of pieces) {
      tokens.read(window.subarray(done, done + length), (starts[document] ?? 0) + begin);
      done += length;
    }
    return done;
  };
  const piecesOf = gptSamples({ lengths, seq, seed, name: `${share === 0 ? "data.sources" : `data.${name}`}.${number}` });
  const { count: once, piecesOf: wholePieces } = wholeSamples({ lengths, seq });
  return {
    ...{ prefix, end: described?.end_of_document ?? undefined },
    sample: (n, window) => void read(piecesOf(n), window),
    once,
    whole: (n, window) => read(wholePieces(n), window),
  };
}
