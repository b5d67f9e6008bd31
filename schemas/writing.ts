/** Writing files: folders that are made for them, and errors, each with the way out that fits it. */
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

/** A system error of writing `path` as a Trouble that states the cause; any other error as it is. */
export function unwritten(path: string, error: unknown): unknown {
  const { code } = error as NodeJS.ErrnoException;
  if (error instanceof Trouble || code === undefined) return error;
  const [why, fix] = reasons[code] ?? [undefined, PLACE];
  return new Trouble(`${path}: cannot be written${why ? `: ${why}` : ""} (${code})`, fix);
}

/**
 * Makes a folder and those above it; returns the outermost that was made. Throws the system's error, and
 * then leaves none. It stands for mkdir's own recursion, which
 * in Node 20 never ends below a folder that takes none, such as /proc.
 */
export function makeFolder(folder: string): string | undefined {
  const missing: string[] = [];
  for (let at = resolve(folder); !existsSync(at); at = dirname(at)) missing.unshift(at);
  const made: string[] = [];
  try {
    for (const at of missing)
      try {
        mkdirSync(at);
        made.unshift(at);
      } catch (error) {
        // a process of another host may have made it meanwhile
        if (!statSync(at, { throwIfNoEntry: false })?.isDirectory()) throw error;
      }
  } catch (error) {
    for (const at of made) rmdirSync(at);
    throw error;
  }
  return made.at(-1);
}
