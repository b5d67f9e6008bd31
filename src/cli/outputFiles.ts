/**
 * Files that a command leaves behind: all of them whole, or none. Each is written beside its place, then renamed into it; but what is no
 * regular file, such as /dev/stdout or a pipe, is written to as it is.
 */
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  fstatSync,
  ftruncateSync,
  openSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { dirname, join, resolve } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";

/** Names may lie in folders below. Throws a Trouble, and then leaves nothing. */
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

/** Throws a Trouble, and then leaves the file as it was. */
export function writeFile(path: string, content: string | Uint8Array): void {
  try {
    writeTogether([[path, content]]);
  } catch (error) {
    throw unwritten(path, error);
  }
}

/** Throws the Trouble that writing the file later would throw, so that no work is done in vain. Leaves nothing. */
export function expectWritable(path: string): void {
  try {
    const stat = statSync(path, { throwIfNoEntry: false });
    if (stat?.isDirectory()) throw Object.assign(new Error(), { code: "EISDIR" });
    if (stat) accessSync(path, constants.W_OK);
    if (!stat || stat.isFile()) probe(dirname(targetOf(path)));
  } catch (error) {
    throw unwritten(path, error);
  }
}

/** The same of a folder that `writeFolder` is to make. */
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

/** Writes a small file into a folder, and removes it. Throws the system's error. */
function probe(folder: string): void {
  const path = join(folder, `.rankc-${process.pid}.tmp`);
  try {
    writeFileSync(path, "probe");
  } finally {
    rmSync(path, { force: true });
  }
}

/** A file that grows by whole lines. */
export interface Lines {
  /** Throws a Trouble where the line could not be written; what was written of it is taken back. */
  add(line: string): void;
  close(): void;
}

/** Opens a file anew, or to go on behind what it holds. Throws a Trouble. */
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

/** Where a path leads: through symbolic links, which stay. */
const targetOf = (path: string): string => (existsSync(path) ? realpathSync(path) : path);

function writeTogether(files: readonly (readonly [string, string | Uint8Array])[]): void {
  const staged = files.map(([path, content]) => {
    const target = targetOf(path);
    const special = existsSync(path) && !statSync(path).isFile() && !statSync(path).isDirectory();
    return { path: target, content, temporary: special ? undefined : `${target}.${process.pid}.tmp` };
  });
  try {
    for (const { path, temporary, content } of staged) writeFileSync(temporary ?? path, content);
    for (const { path, temporary } of staged) if (temporary !== undefined) renameSync(temporary, path);
  } finally {
    for (const { temporary } of staged) if (temporary !== undefined) rmSync(temporary, { force: true });
  }
}
