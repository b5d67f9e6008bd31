/**
 * The folder of a run's checkpoints: `step-00000020/` for each, with the suffix `.part` while it is written, and `run.lock` while a run
 * saves there.
 */
import { randomUUID } from "node:crypto";
import { closeSync, existsSync, openSync, readdirSync, readFileSync, rmSync, statSync, utimesSync, writeSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import { TEXT } from "./snapshotFile.ts";

/** Returns the folder name of the checkpoint of a step. */
export const folderOf = (step: number): string => `step-${String(step).padStart(8, "0")}`;

/** Lists the checkpoints of a folder by ascending step. `whole`: snapshot.json exists, which is written last. */
export function checkpointsIn(folder: string): { readonly name: string; readonly step: number; readonly whole: boolean }[] {
  if (!statSync(folder, { throwIfNoEntry: false })?.isDirectory()) return [];
  return readdirSync(folder)
    .flatMap((name) => {
      const step = /^step-(\d+)(\.part)?$/.exec(name)?.[1];
      return step === undefined
        ? []
        : [{ name, step: Number(step), whole: !name.endsWith(".part") && existsSync(join(folder, name, TEXT)) }];
    })
    .sort((a, b) => a.step - b.step);
}

/** The checkpoint that a run resumes from. */
export interface Chosen {
  /** The folder of the checkpoint; undefined if there is none and the run starts at step 0. */
  readonly at: string | undefined;
  /** Messages about the choice. */
  readonly notes: readonly string[];
  /** Names of newer checkpoints that are damaged, and so are not used. */
  readonly damaged?: readonly string[];
}

/**
 * Returns the checkpoint that a path names: the path itself, or the newest checkpoint in it. Throws a Trouble if there is none, or if the
 * newest has no snapshot.json: an older checkpoint would silently repeat steps that were saved.
 */
export function chooseCheckpoint(path: string): Chosen & { readonly at: string } {
  if (existsSync(join(path, TEXT))) return { at: path, notes: [] };
  const { newest, broken, parts } = newestIn(path);
  if (!newest && broken.length === 0) throw new Trouble(`${path} contains no checkpoint`, "name a folder that `rankc run --save` wrote to");
  if (!newest || broken.length > 0) {
    const older = newest ? `; the newest complete one is ${newest}, and a resume from it repeats the steps between` : "";
    throw new Trouble(
      `${path}: ${broken.at(-1)} is incomplete: it has no ${TEXT}${older}`,
      newest
        ? `name a checkpoint: ${join(path, newest)}; a run that saves here can use --resume auto, which selects the newest complete one`
        : "use another checkpoint of the run",
    );
  }
  return { at: join(path, newest), notes: parts.map((name) => `${join(path, name)} is unfinished and not used`) };
}

/**
 * Returns the newest complete checkpoint of a folder, for `--resume auto`; `at` is undefined if there is none. `expectComplete` throws a
 * Trouble for a damaged checkpoint, which is passed over.
 */
export function newestCheckpoint(folder: string, expectComplete: (at: string) => void): Chosen {
  const notes: string[] = [];
  const damaged: string[] = [];
  for (const { name, whole } of checkpointsIn(folder).reverse()) {
    const at = join(folder, name);
    if (!whole) {
      notes.push(`${at} is unfinished and not used`);
      continue;
    }
    try {
      expectComplete(at);
      return { at, notes: [...notes, `resumed from ${at}`], damaged };
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      notes.push(`${at} is damaged and not used: ${error.message}`);
      damaged.push(name);
    }
  }
  return { at: undefined, notes: [...notes, `${folder} contains no complete checkpoint: the run starts at step 0`], damaged };
}

function newestIn(folder: string) {
  const all = checkpointsIn(folder);
  const newest = all.findLast(({ whole }) => whole);
  const later = all.filter(({ step, whole }) => !whole && step > (newest?.step ?? -1)).map(({ name }) => name);
  const parts = later.filter((name) => name.endsWith(".part"));
  return { newest: newest?.name, broken: later.filter((name) => !name.endsWith(".part")), parts };
}

/** Throws a Trouble if the folder has a checkpoint of a step after `done`: the later steps of another run would mix with this run's. */
export function expectRoom(folder: string, done: number): void {
  const later = checkpointsIn(folder).findLast(({ step, whole }) => whole && step > done);
  if (later)
    throw new Trouble(
      `${folder} contains a checkpoint of step ${later.step}, and this run begins after step ${done}`,
      "resume from it with --resume, or use another --save folder",
    );
}

/** Creates the folder and writes a probe file, so that a run that cannot save fails before it trains. Throws a Trouble. */
export function expectWritableFolder(folder: string): void {
  const probe = join(folder, `probe.${randomUUID()}`);
  try {
    makeFolder(folder);
    writeNew(probe, "probe");
    rmSync(probe);
  } catch (error) {
    throw unwritten(folder, error);
  }
}

/** The claim of a run on its save folder. */
export interface FolderLock {
  /** Throws a Trouble if another run has claimed the folder, or if the folder is no longer writable. */
  expectHeld(): void;
  release(): void;
}

interface Owner {
  readonly id: string;
  readonly host: string;
  readonly pid: number;
  readonly since: string;
}
/** The ids of the locks that this process holds. */
const held = new Set<string>();
const TOUCH_MS = 60_000;
/** A lock of another host is stale after this time without an update: its run ended without removing it. */
const STALE_MS = 10 * TOUCH_MS;

/** Claims the folder for one run, until `release` or the end of the process. Throws a Trouble if another run saves there. */
export function lockFolder(folder: string): FolderLock {
  const path = join(folder, "run.lock");
  const own: Owner = { id: randomUUID(), host: hostname(), pid: process.pid, since: new Date().toISOString() };
  try {
    makeFolder(folder);
    const other = ownerOf(path);
    if (other && isAlive(path, other)) throw taken(folder, path, other);
    claim(path, own);
  } catch (error) {
    const other = (error as NodeJS.ErrnoException).code === "EEXIST" && ownerOf(path);
    throw other ? taken(folder, path, other) : unwritten(folder, error);
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
      if (other && other.id !== own.id) throw taken(folder, path, other);
      // the lock file was removed
      if (!other) claim(path, own);
    },
    release() {
      clearInterval(touch);
      held.delete(own.id);
      // if the removal fails, the lock names a process that has ended, and the next run replaces it
      attempt(() => rmSync(path, { force: true }));
    },
  };
}

/** Returns whether a run saves into the folder. */
export function isLocked(folder: string): boolean {
  const path = join(folder, "run.lock");
  const owner = ownerOf(path);
  return owner !== undefined && isAlive(path, owner);
}

const taken = (folder: string, path: string, { host, pid, since }: Owner): Trouble =>
  new Trouble(
    `${folder}: another run saves there: process ${pid} on ${host}, since ${since}`,
    `use another --save folder; if that run has ended, remove ${path}`,
  );

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
function writeNew(path: string, text: string): void {
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
