/**
 * The folder of a run's snapshots: `step-00000020/` for each, `.part` behind the name of one that is being written, and `run.lock` while
 * a run saves there.
 */
import { randomUUID } from "node:crypto";
import { closeSync, existsSync, openSync, readdirSync, readFileSync, rmSync, statSync, utimesSync, writeSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import { TEXT } from "./checkpointFile.ts";

export const folderOf = (step: number): string => `step-${String(step).padStart(8, "0")}`;

/** The snapshots of a folder by step, ascending; `whole`: snapshot.json is there, which is written last. */
function snapshotsIn(folder: string): { readonly name: string; readonly step: number; readonly whole: boolean }[] {
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

export interface Chosen {
  /** The folder of the snapshot; undefined where there is none, and the run starts at its beginning. */
  readonly at: string | undefined;
  /** What a person should read about the choice. */
  readonly notes: readonly string[];
}

/**
 * The snapshot that a path names: itself, or the newest in a folder of them. Throws a Trouble where there is none, or where the newest
 * lost its snapshot.json: an older one would then undo steps that the person believes saved.
 */
export function chooseSnapshot(path: string): Chosen & { readonly at: string } {
  if (existsSync(join(path, TEXT))) return { at: path, notes: [] };
  const { newest, broken, parts } = newestIn(path);
  if (!newest && broken.length === 0) throw new Trouble(`${path} holds no snapshot`, "name a folder that `rankc run --save` wrote to");
  if (!newest || broken.length > 0) {
    const older = newest ? `; the newest whole one is ${newest}, and going on from it repeats the steps between` : "";
    throw new Trouble(
      `${path}: ${broken.at(-1)} has no ${TEXT} and is no whole snapshot${older}`,
      newest
        ? `name the one that is meant: ${join(path, newest)}; or for a run that saves here: --resume auto, which takes the newest whole one`
        : "take another snapshot of the run",
    );
  }
  return { at: join(path, newest), notes: parts.map((name) => `${join(path, name)} is unfinished and not used`) };
}

/** `--resume auto`: the newest whole snapshot of the folder that the run saves to; undefined where there is none yet. */
export function newestSnapshot(folder: string): Chosen {
  const { newest, broken, parts } = newestIn(folder);
  const at = newest && join(folder, newest);
  const begins = at ? `resumed from ${at}` : `${folder} holds no whole snapshot: the run starts at step 0`;
  return { at, notes: [...[...broken, ...parts].map((name) => `${join(folder, name)} is unfinished and not used`), begins] };
}

function newestIn(folder: string) {
  const all = snapshotsIn(folder);
  const newest = all.findLast(({ whole }) => whole);
  const later = all.filter(({ step, whole }) => !whole && step > (newest?.step ?? -1)).map(({ name }) => name);
  const parts = later.filter((name) => name.endsWith(".part"));
  return { newest: newest?.name, broken: later.filter((name) => !name.endsWith(".part")), parts };
}

/** Throws a Trouble where a run that begins after step `done` would leave snapshots of another run's later steps beside its own. */
export function expectRoom(folder: string, done: number): void {
  const later = snapshotsIn(folder).findLast(({ step, whole }) => whole && step > done);
  if (later)
    throw new Trouble(
      `${folder} holds a snapshot of step ${later.step}, and this run begins after step ${done}`,
      "go on from it with --resume, or name another folder after --save",
    );
}

/** Makes the folder and writes to it, so that a run which cannot save ends before it trains. Throws a Trouble. */
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

export interface FolderLock {
  /** Throws a Trouble where another run took the folder over, or the folder can no longer be written. */
  expectHeld(): void;
  release(): void;
}

interface Owner {
  readonly id: string;
  readonly host: string;
  readonly pid: number;
  readonly since: string;
}
/** The ids of this process's own locks. */
const held = new Set<string>();
const TOUCH_MS = 60_000;
/** A lock of another host that was not touched for so long is of a run that ended without a word. */
const STALE_MS = 10 * TOUCH_MS;

/** Claims the folder for one run, until `release` or the end of the process. Throws a Trouble where another run saves there. */
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
  // what fails here fails again when the run saves, where it is reported
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
      // somebody removed it
      if (!other) claim(path, own);
    },
    release() {
      clearInterval(touch);
      held.delete(own.id);
      // a lock that stays is of a process that is gone
      attempt(() => rmSync(path, { force: true }));
    },
  };
}

const taken = (folder: string, path: string, { host, pid, since }: Owner): Trouble =>
  new Trouble(
    `${folder}: another run saves there: process ${pid} on ${host}, since ${since}`,
    `name another folder after --save; if that run is over, remove ${path}`,
  );

function ownerOf(path: string): Owner | undefined {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch {
    // it is not there, or its writer ended before the text was whole
    return undefined;
  }
}

/** Whether the run that holds the lock still runs: on this host by its process, on another by the lock's age. */
function isAlive(path: string, { id, host, pid }: Owner): boolean {
  if (host !== hostname()) return Date.now() - (statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0) < STALE_MS;
  // a process that was started anew may have the number of the one before it
  if (pid === process.pid) return held.has(id);
  try {
    // signal 0 asks only
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

/** Throws the system's error where the file is there already. */
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
