/** Locks: a file that names the process which claims a folder or a set of files. */
import { randomUUID } from "node:crypto";
import { closeSync, openSync, readFileSync, rmSync, statSync, utimesSync, writeSync } from "node:fs";
import { hostname } from "node:os";
import { dirname } from "node:path";
import type { Trouble } from "../schemas/trouble.ts";
import { makeFolder, unwritten } from "../schemas/writing.ts";

/** The claim of a process. */
export interface FileLock {
  /** Throws a Trouble if another process has claimed it, or if the lock cannot be written any more. */
  expectHeld(): void;
  release(): void;
}

/** The process that has claimed something. */
export interface Owner {
  readonly id: string;
  readonly host: string;
  readonly pid: number;
  readonly since: string;
}
/** The ids of the locks that this process holds. */
const held = new Set<string>();
const TOUCH_MS = 60_000;
/** A lock of another host is stale after this time without an update: its process ended without removing it. */
const STALE_MS = 10 * TOUCH_MS;

/**
 * Creates a lock file, until `release` or the end of the process. `taken`: returns the error if another process that runs has it; `what`: what
 * the error of a lock that cannot be written names.
 */
export function lockFile(path: string, taken: (owner: Owner) => Trouble, what = path): FileLock {
  const own: Owner = { id: randomUUID(), host: hostname(), pid: process.pid, since: new Date().toISOString() };
  try {
    makeFolder(dirname(path));
    const other = ownerOf(path);
    if (other && isAlive(path, other)) throw taken(other);
    claim(path, own);
  } catch (error) {
    const other = (error as NodeJS.ErrnoException).code === "EEXIST" && ownerOf(path);
    throw other ? taken(other) : unwritten(what, error);
  }
  held.add(own.id);
  const isMine = (): boolean => ownerOf(path)?.id === own.id;
  // an error here recurs when the run saves, and is reported then
  const attempt = (change: () => void): void => {
    try {
      if (isMine()) change();
    } catch {}
  };
  const touch = setInterval(() => attempt(() => utimesSync(path, new Date(), new Date())), TOUCH_MS).unref();
  return {
    expectHeld() {
      const other = ownerOf(path);
      if (other && other.id !== own.id) throw taken(other);
      // the lock file was removed
      if (!other) claim(path, own);
    },
    release() {
      clearInterval(touch);
      held.delete(own.id);
      // if the removal fails, the lock names a process that has ended, and the next process replaces it
      attempt(() => rmSync(path, { force: true }));
    },
  };
}

/** Returns whether a process that runs holds the lock. */
export function isLockHeld(path: string): boolean {
  const owner = ownerOf(path);
  return owner !== undefined && isAlive(path, owner);
}

function ownerOf(path: string): Owner | undefined {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch {
    // the file does not exist, or its writer ended before the text was complete
    return undefined;
  }
}

/** Returns whether the owner of a lock still runs: by its process on this host, by the age of the lock on another host. */
function isAlive(path: string, { id, host, pid }: Owner): boolean {
  if (host !== hostname()) return Date.now() - (statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0) < STALE_MS;
  // a restarted process may have the process id of its predecessor
  if (pid === process.pid) return held.has(id);
  try {
    // signal 0 only tests whether the process exists
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

function claim(path: string, owner: Owner): void {
  rmSync(path, { force: true });
  writeNew(path, JSON.stringify(owner));
}

/** Creates a file. Throws the system error if it exists. */
export function writeNew(path: string, text: string): void {
  const fd = openSync(path, "wx");
  try {
    writeSync(fd, text);
  } catch (error) {
    rmSync(path, { force: true });
    throw error;
  } finally {
    closeSync(fd);
  }
}
