/** Helpers for writing files: creation of folders, and errors with a fix for each cause. */
import { existsSync, mkdirSync, rmdirSync, statSync } from "node:fs";
import { dirname, resolve } from "node:path";
import { Trouble } from "./trouble.ts";

const PLACE = "name a place that you can write to";
const SPACE = "free some space, or name a place on another disk";
const reasons: Readonly<Record<string, readonly [why: string, fix: string]>> = {
  ENOSPC: ["the disk is full", SPACE],
  EDQUOT: ["the disk quota is used up", SPACE],
  EFBIG: ["the file exceeds the size that the system allows", "raise the limit (ulimit -f), or name a place on another file system"],
  EROFS: ["the file system is read-only", PLACE],
  EACCES: ["no permission", PLACE],
  EPERM: ["no permission", PLACE],
  ENOENT: ["the folder does not exist", PLACE],
  ENOTDIR: ["a part of the path is a file", PLACE],
  EISDIR: ["it is a folder", "name a file"],
  EIO: ["the disk reported an error", "check the disk, or name a place on another one"],
};

/** Returns a system error of writing `path` as Trouble with cause and fix; returns any other error unchanged. */
export function unwritten(path: string, error: unknown): unknown {
  const { code } = error as NodeJS.ErrnoException;
  if (error instanceof Trouble || code === undefined) return error;
  const [why, fix] = reasons[code] ?? [undefined, PLACE];
  return new Trouble(`${path}: cannot be written${why ? `: ${why}` : ""} (${code})`, fix);
}

/**
 * Creates a folder and its missing parents, with the permissions of `mode`. Returns the outermost folder that was created. On failure it removes them and throws the
 * system error. It replaces the recursive mkdir, which in Node 20 never returns below a folder that accepts none, such as /proc.
 */
export function makeFolder(folder: string, mode = 0o777): string | undefined {
  const missing: string[] = [];
  for (let at = resolve(folder); !existsSync(at); at = dirname(at)) missing.unshift(at);
  const made: string[] = [];
  try {
    for (const at of missing)
      try {
        mkdirSync(at, mode);
        made.unshift(at);
      } catch (error) {
        // another process may have created it meanwhile
        if (!statSync(at, { throwIfNoEntry: false })?.isDirectory()) throw error;
      }
  } catch (error) {
    for (const at of made) rmdirSync(at);
    throw error;
  }
  return made.at(-1);
}
