/** The corpus of a job on the disk, its tokens and maybe labels, open until it is closed, and its batches. */
import { type BatchOf, batchesOf, type Reading } from "./batches.ts";
import { openInput } from "./inputFile.ts";

export type Opened = { readonly batch: BatchOf; readonly close: () => void };

export function openCorpus({ path, labels }: { readonly path: string; readonly labels?: string | undefined }, reading: Reading): Opened {
  const place = (key: string) => `${key} starts at the folder of the job or plan; --data-dir names another`;
  const ids = openInput(path, "the corpus", place("data.path"));
  const open = [ids];
  const close = (): void => {
    for (const file of open) file.close();
  };
  try {
    const beside = labels === undefined ? undefined : openInput(labels, "the file of labels", place("data.labels"));
    if (beside) open.push(beside);
    return { batch: batchesOf({ ids, labels: beside }, reading), close };
  } catch (error) {
    close();
    throw error;
  }
}
