/** Errors of writing files, each with the way out that fits it. */
import { Trouble } from "../schemas/trouble.ts";

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
