/** Opens input files for random access. Errors of a path are a Trouble that names it. */
import { closeSync, constants, existsSync, fstatSync, openSync, readdirSync, readSync, statSync } from "node:fs";
import { join } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";

/** An open file. */
export type InputFile = {
  readonly path: string;
  readonly bytes: number;
  /** Fills `into` with the bytes that start at `at`. */
  readonly read: (into: Uint8Array, at: number) => void;
  readonly close: () => void;
};

/** Returns whether a path exists. */
export const isThere = (path: string): boolean => existsSync(path);

/** Returns whether a path is a folder. */
export const isFolder = (path: string): boolean => statSync(path, { throwIfNoEntry: false })?.isDirectory() ?? false;

/** Lists the files of a folder and of the folders in it whose names match, by path; a path that is no folder is the list itself. */
export function listFiles(path: string, names: RegExp): string[] {
  if (!isFolder(path)) return [path];
  return readdirSync(path, { withFileTypes: true })
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .flatMap((entry) => {
      const below = join(path, entry.name);
      return entry.isDirectory() ? listFiles(below, names) : entry.isFile() && names.test(entry.name) ? [below] : [];
    });
}

/** Returns the size of a file, and when it was changed last, in ms. Throws a Trouble if it is no file. */
export function fileStamp(path: string): { readonly bytes: number; readonly changed: number } {
  openInput(path, "the corpus", "paths start at the current folder").close();
  const { size, mtimeMs } = statSync(path);
  return { bytes: size, changed: Math.round(mtimeMs) };
}

/** Reads a whole file. `what`: its role in messages. Throws a Trouble. */
export function readWhole(path: string, what: string): Uint8Array {
  const file = openInput(path, what, "the path starts at the current folder");
  try {
    const bytes = new Uint8Array(file.bytes);
    file.read(bytes, 0);
    return bytes;
  } finally {
    file.close();
  }
}

/** Opens a file. `what`: its role in messages, such as "the corpus"; `place`: a hint about the base directory. Throws a Trouble. */
export function openInput(path: string, what: string, place: string): InputFile {
  // without O_NONBLOCK, which Windows lacks, opening a pipe waits for its writer
  const flags = constants.O_RDONLY | (constants.O_NONBLOCK ?? 0);
  const fd = attempt(path, what, () => openSync(path, flags), place);
  const stat = fstatSync(fd);
  if (!stat.isFile()) {
    closeSync(fd);
    const found = stat.isDirectory() ? "a directory" : "not a regular file";
    throw new Trouble(`${path}: ${what} is ${found}`, "name a file");
  }
  return {
    path,
    bytes: stat.size,
    read: (into, at) => {
      let done = 0;
      while (done < into.length) {
        // 1 GiB at a time: one call reads less than 2 GiB
        const length = Math.min(into.length - done, 2 ** 30);
        const got = attempt(path, what, () => readSync(fd, into, done, length, at + done));
        if (got === 0)
          throw new Trouble(`${path}: ${what} ends at byte ${at + done}; it was cut while it was read`, "read it once nobody writes it");
        done += got;
      }
    },
    close: () => closeSync(fd),
  };
}

const waysOut: Readonly<Record<string, readonly [string, string]>> = {
  ENOENT: ["does not exist", "check the path"],
  ENOTDIR: ["does not exist", "a part of the path is a file, not a directory"],
  EACCES: ["may not be read", "give yourself the right to read it"],
  EISDIR: ["is a directory", "name a file"],
  EMFILE: ["cannot be opened beside so many open files", "raise their limit for one process: ulimit -n 65536"],
};

function attempt<T>(path: string, what: string, io: () => T, place?: string): T {
  try {
    return io();
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code ?? String(error);
    const [found, fix] = waysOut[code] ?? [`cannot be read (${code})`, "check the path and the disk"];
    throw new Trouble(`${path}: ${what} ${found}`, place && code === "ENOENT" ? `${fix}; ${place}` : fix);
  }
}
