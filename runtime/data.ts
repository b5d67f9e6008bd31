/** The text of a job on the disk, open until it is closed, and its batches. */
import { type BatchOf, batchesOf, type Reading } from "./batches.ts";
import { openInput } from "./inputFile.ts";

export type Corpus = { readonly batch: BatchOf; readonly close: () => void };

export function openCorpus(path: string, reading: Reading): Corpus {
  const file = openInput(path, "the corpus", "data.path starts at the folder of the job or plan; --data-dir names another");
  try {
    return { batch: batchesOf(file, reading), close: file.close };
  } catch (error) {
    file.close();
    throw error;
  }
}
