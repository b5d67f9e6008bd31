/**
 * The folder of a run's checkpoints: `step-00000020/` for each, with the suffix `.part` while it is written, and `run.lock` while a run
 * saves there.
 */
import { randomUUID } from "node:crypto";
import { existsSync, readdirSync, rmSync, statSync } from "node:fs";
import { join } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import { type FileLock, isLockHeld, lockFile, type Owner, writeNew } from "../lockFile.ts";
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

/** Claims the folder for one run, until `release` or the end of the process. Throws a Trouble if another run saves there. */
export function lockFolder(folder: string): FileLock {
  const path = join(folder, "run.lock");
  return lockFile(path, (owner) => taken(folder, path, owner), folder);
}

/** Returns whether a run saves into the folder. */
export const isLocked = (folder: string): boolean => isLockHeld(join(folder, "run.lock"));

const taken = (folder: string, path: string, { host, pid, since }: Owner): Trouble =>
  new Trouble(
    `${folder}: another run saves there: process ${pid} on ${host}, since ${since}`,
    `use another --save folder; if that run has ended, remove ${path}`,
  );
