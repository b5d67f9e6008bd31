/** Opens the corpus of a job on disk: tokens, optional index and labels, and batches of them. */
import { indexPath } from "../../schemas/dataFiles.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type BatchOf, batchesOf, type Reading } from "../train/inputs.ts";
import { isThere, openInput } from "./inputFile.ts";

/** An open corpus. */
export type Opened = { readonly batch: BatchOf; readonly close: () => void };

/**
 * Opens the files of `data.path` and `data.labels`, given as absolute paths, and PREFIX.idx where the ids of PREFIX.bin have one.
 * Throws a Trouble if one is missing or cannot be read, or as `batchesOf` does.
 */
export function openCorpus({ path, labels }: { readonly path: string; readonly labels?: string | undefined }, reading: Reading): Opened {
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
    return { batch: batchesOf({ ids, index, labels: marks }, reading), close };
  } catch (error) {
    close();
    throw error;
  }
}

/** Ways in which other tools name data, and what to write here. A path was made absolute, which leaves one slash of a URL's two. */
const namings: readonly { readonly pattern: RegExp; readonly found: string; readonly fix: string }[] = [
  {
    pattern: /(^|\/)[a-z][a-z0-9+.-]+:\/(?!$)/i,
    ...{ found: "is a URL", fix: "download the file, and name the copy on the disk" },
  },
  {
    pattern: /(^|\/)(\d*\.)?\d+\s+\S+\s+(\d*\.)?\d+\s+\S/,
    ...{ found: "is a blend of data sets", fix: "rankc reads one file: write the blend to one .bin file" },
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
