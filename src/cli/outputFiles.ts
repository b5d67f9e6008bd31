/**
 * Writes the files of a command: all of them completely, or none. Each is written to a temporary file and renamed; special files, such as
 * /dev/stdout or a pipe, are written directly.
 */
import {
  accessSync,
  chmodSync,
  closeSync,
  constants,
  existsSync,
  fstatSync,
  ftruncateSync,
  openSync,
  realpathSync,
  renameSync,
  rmSync,
  statfsSync,
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { dirname, join, resolve } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";

/** Writes files into a folder; names may contain subfolders. On an error it removes what it created and throws a Trouble. */
export function writeFolder(folder: string, files: Readonly<Record<string, string | Uint8Array>>): void {
  const made: string[] = [];
  try {
    for (const name of ["", ...Object.keys(files)]) made.push(makeFolder(name === "" ? folder : dirname(join(folder, name))) ?? "");
    writeTogether(Object.entries(files).map(([name, text]) => [join(folder, name), text]));
  } catch (error) {
    for (const at of made) if (at !== "") rmSync(at, { recursive: true, force: true });
    throw unwritten(folder, error);
  }
}

/** Writes a file. On an error the old file is unchanged and it throws a Trouble. */
export const writeFile = (path: string, content: string | Uint8Array): void => writeFiles([[path, content]]);

/** Writes files, all or none; those that exist keep their modes. On an error it throws a Trouble. */
export function writeFiles(files: readonly (readonly [path: string, content: string | Uint8Array])[]): void {
  try {
    writeTogether(files);
  } catch (error) {
    throw unwritten(files.map(([path]) => path).join(", "), error);
  }
}

/** Throws the Trouble that writing the file would throw, before expensive work starts. Creates no file. */
export function expectWritable(path: string): void {
  try {
    const stat = statSync(path, { throwIfNoEntry: false });
    if (stat?.isDirectory()) throw Object.assign(new Error(), { code: "EISDIR" });
    if (stat) accessSync(path, constants.W_OK);
    // root may write any file; a file that nobody may write is read-only all the same
    if (stat?.isFile() && (stat.mode & 0o222) === 0) throw new Trouble(`${path} is read-only`, "allow to write it: chmod u+w");
    if (!stat || stat.isFile()) probe(dirname(targetOf(path)));
  } catch (error) {
    throw unwritten(path, error);
  }
}

/** Throws the Trouble that `writeFolder` would throw. */
export function expectWritableFolder(folder: string): void {
  if (existsSync(folder) && !statSync(folder).isDirectory())
    throw new Trouble(`${folder} is a file, not a directory`, "name another directory after -o");
  let at = resolve(folder);
  while (!existsSync(at)) at = dirname(at);
  try {
    probe(at);
  } catch (error) {
    throw unwritten(folder, error);
  }
}

/** Writes a small file into a folder, and removes it. Throws the system error. */
function probe(folder: string): void {
  const path = join(folder, `.rankc-${process.pid}.tmp`);
  try {
    writeFileSync(path, "probe");
  } finally {
    rmSync(path, { force: true });
  }
}

/** A file to which complete lines are appended. */
export interface Lines {
  /** Appends a line. On an error it removes the incomplete line and throws a Trouble. */
  add(line: string): void;
  close(): void;
}

/** Opens a file for lines: `new` truncates it, `append` keeps its content. Throws a Trouble. */
export function openLines(path: string, how: "new" | "append"): Lines {
  const attempt = <T>(act: () => T): T => {
    try {
      return act();
    } catch (error) {
      throw unwritten(path, error);
    }
  };
  const fd = attempt(() => openSync(path, how === "new" ? "w" : "a"));
  return {
    add: (line) =>
      attempt(() => {
        const stat = fstatSync(fd);
        const bytes = Buffer.from(line);
        try {
          for (let at = 0; at < bytes.length; ) at += writeSync(fd, bytes, at);
        } catch (error) {
          if (stat.isFile()) ftruncateSync(fd, stat.size);
          throw error;
        }
      }),
    close: () => closeSync(fd),
  };
}

/** Resolves symbolic links, so that a write keeps them. */
const targetOf = (path: string): string => (existsSync(path) ? realpathSync(path) : path);

function writeTogether(files: readonly (readonly [string, string | Uint8Array])[]): void {
  const staged = files.map(([path, content]) => {
    const target = targetOf(path);
    const special = existsSync(path) && !statSync(path).isFile() && !statSync(path).isDirectory();
    return { path: target, content, temporary: special ? undefined : `${target}.${process.pid}.tmp` };
  });
  try {
    for (const { path, temporary, content } of staged) {
      writeFileSync(temporary ?? path, content);
      if (temporary !== undefined && existsSync(path)) chmodSync(temporary, statSync(path).mode);
    }
    for (const { path, temporary } of staged) if (temporary !== undefined) renameSync(temporary, path);
  } finally {
    for (const { temporary } of staged) if (temporary !== undefined) rmSync(temporary, { force: true });
  }
}

/** Returns the bytes that the disk of a folder has left for this user. */
export function freeBytes(folder: string): number {
  const { bavail, bsize } = statfsSync(folder);
  return bavail * bsize;
}

/**
 * Writes files piece by piece, so that none is whole in memory: all of them, or none. Their folders are made. On an error it removes what it
 * wrote and throws a Trouble about `what`, unless the error is one.
 */
export function writeStreams(files: Iterable<readonly [path: string, content: Iterable<string | Uint8Array>]>, what: string): void {
  const staged: { readonly path: string; readonly temporary: string }[] = [];
  const made: string[] = [];
  try {
    for (const [path, content] of files) {
      made.push(makeFolder(dirname(path)) ?? "");
      const target = targetOf(path);
      if (existsSync(target) && !statSync(target).isFile()) writePieces(target, content);
      else {
        const temporary = `${target}.${process.pid}.tmp`;
        staged.push({ path: target, temporary });
        writePieces(temporary, content);
      }
    }
    for (const { path, temporary } of staged) renameSync(temporary, path);
  } catch (error) {
    for (const { temporary } of staged) rmSync(temporary, { force: true });
    for (const at of made) if (at !== "") rmSync(at, { recursive: true, force: true });
    throw error instanceof Trouble ? error : unwritten(what, error);
  }
}

/** Bytes that are written at once. */
const PIECE = 1 << 18;

function writePieces(path: string, content: Iterable<string | Uint8Array>): void {
  const fd = openSync(path, "w");
  try {
    let waiting: Uint8Array[] = [];
    let size = 0;
    const flush = (): void => {
      const bytes = Buffer.concat(waiting);
      for (let at = 0; at < bytes.length; ) at += writeSync(fd, bytes, at);
      [waiting, size] = [[], 0];
    };
    for (const piece of content) {
      const bytes = typeof piece === "string" ? Buffer.from(piece) : piece;
      waiting.push(bytes);
      size += bytes.length;
      if (size >= PIECE) flush();
    }
    flush();
  } finally {
    closeSync(fd);
  }
}
