/** Makes a written checkpoint complete, checks complete ones, and removes older ones. */
import { closeSync, existsSync, fsyncSync, openSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Trouble } from "../../schemas/trouble.ts";
import { openSafetensors } from "./safetensors.ts";
import { checkpointsIn } from "./saveFolder.ts";
import { type CheckpointText, printCheckpointText, readCheckpointText, TEXT } from "./snapshotFile.ts";

/** An error of the file system, or of another rank's: a checkpoint was not saved, and training may continue. */
export class SaveFault extends Trouble {}

/** A checkpoint whose files are written. */
export interface WrittenCheckpoint {
  /** The folder that has the files, and its final name. */
  readonly part: string;
  readonly whole: string;
  readonly text: Omit<CheckpointText, "format" | "files">;
  /** The names of the files of all ranks. */
  readonly files: readonly string[];
}

/** Adds snapshot.json, checks the checkpoint as a reader would, and renames the folder. Throws a Trouble if a file is missing or damaged. */
export function commitCheckpoint({ part, whole, text, files }: WrittenCheckpoint): void {
  const missing = files.filter((name) => !existsSync(join(part, name)));
  if (missing.length > 0)
    throw new Trouble(
      `${part}: files of other ranks are missing: ${missing.slice(0, 5).join(", ")}${missing.length > 5 ? `, and ${missing.length - 5} more` : ""}`,
      "use a --save folder that all hosts share",
    );
  try {
    complete(part, text, files);
  } catch (error) {
    // a file is not as it was written
    throw error instanceof Trouble ? new SaveFault(error.message, error.fix) : error;
  }
  rmSync(whole, { recursive: true, force: true });
  renameSync(part, whole);
  syncFolder(join(whole, ".."));
}

function complete(part: string, text: WrittenCheckpoint["text"], files: readonly string[]): void {
  const step = text.progress.steps;
  const digests = files.map((name): [string, CheckpointText["files"][string]] => {
    const file = openSafetensors(join(part, name));
    file.close();
    return [name, { step, header_sha256: file.headerDigest }];
  });
  writeText(join(part, TEXT), printCheckpointText({ ...text, files: Object.fromEntries(digests) }));
  syncFolder(part);
  expectComplete(part);
}

/** The most files that `expectComplete` opens: every process of a run does so. */
const MOST_FILES = 256;

/**
 * Checks that a checkpoint is complete: snapshot.json is as it was saved, and every file exists, has its length, and the header that
 * snapshot.json states. The values are checked when they are read. Throws a Trouble.
 */
export function expectComplete(at: string): void {
  const { files } = readCheckpointText(join(at, TEXT));
  for (const [name, { header_sha256 }] of Object.entries(files).slice(0, MOST_FILES)) {
    const file = openSafetensors(join(at, name));
    file.close();
    if (file.headerDigest !== header_sha256)
      throw new Trouble(`${file.path} is not the file that was saved: the SHA-256 of its header differs from ${TEXT}'s`, ANOTHER);
  }
}
const ANOTHER = "use another checkpoint of the run";

/** Removes complete checkpoints before `step`, so that `keep` remain with it. Each first loses its name, so that a part of it is never read. */
export function removeOlder(folder: string, step: number, keep: number): void {
  const older = checkpointsIn(folder).filter((found) => found.whole && found.step < step);
  for (const { name } of older.slice(0, Math.max(0, older.length - (keep - 1)))) {
    const gone = join(folder, `${name}.part`);
    try {
      rmSync(gone, { recursive: true, force: true });
      renameSync(join(folder, name), gone);
      rmSync(gone, { recursive: true, force: true });
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      throw new SaveFault(
        `${join(folder, name)}: cannot be removed (${code}); the checkpoint of step ${step} is complete`,
        "remove it by hand",
      );
    }
  }
}

/** Renames damaged checkpoints, so that the run can save their steps again: nothing is lost, and `--resume` does not find them. */
export function setAside(folder: string, names: readonly string[]): void {
  for (const name of names) {
    const aside = join(folder, `${name}.damaged`);
    rmSync(aside, { recursive: true, force: true });
    renameSync(join(folder, name), aside);
  }
}

/** Removes what runs that were killed left unfinished. Only the run that has claimed the folder may call it. */
export function removeUnfinished(folder: string): void {
  for (const { name } of checkpointsIn(folder)) if (name.endsWith(".part")) rmSync(join(folder, name), { recursive: true, force: true });
}

function writeText(path: string, text: string): void {
  const fd = openSync(path, "w");
  try {
    writeFileSync(fd, text);
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/** Flushes the entries of a folder to disk. File systems without support return EINVAL, which is ignored. */
function syncFolder(folder: string): void {
  const fd = openSync(folder, "r");
  try {
    fsyncSync(fd);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EINVAL") throw error;
  } finally {
    closeSync(fd);
  }
}
