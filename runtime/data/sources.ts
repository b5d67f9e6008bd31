/** Opens the sources of a job: data sets in Megatron's indexed format, their samples blended by weight. */
import { datasetPrefix } from "../../schemas/dataFiles.ts";
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { batchesFrom, type Reading } from "../train/inputs.ts";
import { blendOf } from "./blend.ts";
import type { Opened } from "./corpus.ts";
import { gptSamples, splitBounds } from "./gptDataset.ts";
import { type InputFile, isThere, openInput } from "./inputFile.ts";
import { readIndex, readLengths } from "./megatronIndex.ts";
import { readDescription } from "./prepare/description.ts";
import { type Index, idsOf } from "./tokens.ts";

/** Reads sample n of a source: `seq` + 1 tokens. */
type ReadSample = (n: number, window: Int32Array) => void;

/**
 * Opens the sources of `data.sources` with absolute paths. `split`: with shares of training, validation and test; the samples are those of
 * training. A batch is a function of the number of sequences before it, so it does not depend on the mesh or on earlier batches. Throws a
 * Trouble if a source is missing, damaged, or does not fit the vocabulary.
 */
export function openSources(sources: NonNullable<Job["data"]["sources"]>, split: readonly number[] | undefined, reading: Reading): Opened {
  const open: { close(): void }[] = [];
  const close = (): void => {
    for (const file of open) file.close();
  };
  try {
    const readers = sources.map(({ path }, i) => openSource(path, i, split, reading, (file) => open.push(file)));
    const sampleOf = blendOf(sources.map(({ weight }) => weight));
    const batch = batchesFrom(reading, ({ first, row }, window) => {
      const { source, index } = sampleOf(first + row);
      readers[source]?.(index, window);
      return undefined;
    });
    return { batch, close };
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
  split: readonly number[] | undefined,
  { seq, vocab, seed }: Reading,
  opened: (file: { close(): void }) => void,
): ReadSample {
  const prefix = datasetPrefix(given);
  const key = `data.sources[${number}]`;
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
  const [from = 0, to = all.length] = split ? splitBounds(split, all.length) : [];
  const lengths = all.subarray(from, to);
  const count = lengths.reduce((sum, length) => sum + length, 0);
  if (count < seq + 1)
    throw new Trouble(
      `${prefix}: the training part of ${key} has ${count} tokens in ${lengths.length} documents; a sample needs ${seq + 1}`,
      "use a longer source, lower model.seq, or give training a larger share in data.split",
    );
  const starts = new Float64Array(lengths.length);
  let at = all.subarray(0, from).reduce((sum, length) => sum + length, 0);
  for (const [i, length] of lengths.entries()) {
    starts[i] = at;
    at += length;
  }
  const piecesOf = gptSamples({ lengths, seq, seed, name: `data.sources.${number}` });
  return (n, window) => {
    let done = 0;
    for (const { document, from: begin, count: length } of piecesOf(n)) {
      tokens.read(window.subarray(done, done + length), (starts[document] ?? 0) + begin);
      done += length;
    }
  };
}
