/** One checkpoint while it is written: its folder and files, the digests of its tensors, and its end, on which all ranks agree. */
import { closeSync, mkdirSync, openSync, rmSync, statfsSync, writeSync } from "node:fs";
import { join } from "node:path";
import type { Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import type { LocalRanks } from "../backend.ts";
import type { RunProgress } from "../train/stepParameters.ts";
import type { BlockResult } from "./blockWriter.ts";
import { commitCheckpoint, removeOlder, SaveFault } from "./commit.ts";
import { folderOf } from "./saveFolder.ts";
import { fileOf, headerFor, type StateFile, type stateFiles } from "./stateFiles.ts";

/** What a checkpoint needs of a run. */
interface SaveSettings {
  readonly plan: Plan;
  readonly folder: string;
  readonly version: string;
  readonly localRanks: Pick<LocalRanks, "ranks" | "meet">;
  readonly keep?: number;
  /** Bytes of a tensor that have a digest of their own. */
  readonly digestBytes: number;
}

/** How far a checkpoint is. */
export interface SaveProgress {
  readonly bytes: number;
  readonly seconds: number;
}

/** One checkpoint under way. */
export class Save {
  /** The first error; the checkpoint is then given up. */
  problem: Error | undefined;
  readonly #settings: SaveSettings;
  readonly #progress: RunProgress;
  readonly #whole: string;
  readonly #part: string;
  readonly #leads: boolean;
  readonly #digests = new Map<number, Map<string, string[]>>();
  readonly #headerBytes = new Map<number, number>();
  /** Bytes that the local ranks have written. */
  #written = 0;
  readonly #begun = performance.now();
  readonly #nonfinite = new Map<string, number>();

  constructor(settings: SaveSettings, progress: RunProgress) {
    this.#settings = settings;
    this.#progress = progress;
    this.#whole = join(settings.folder, folderOf(progress.steps));
    this.#part = `${this.#whole}.part`;
    this.#leads = settings.localRanks.ranks.includes(0);
  }

  pathOf(rank: number): string {
    return join(this.#part, fileOf(rank));
  }

  /** Bytes that the local ranks have written, and the seconds since the begin. */
  written(): SaveProgress {
    return { bytes: this.#written, seconds: (performance.now() - this.#begun) / 1000 };
  }

  headerOf(file: StateFile): Uint8Array {
    return headerFor(file, this.#progress.steps, this.#settings.digestBytes, this.#digests.get(file.rank));
  }

  /** Bytes of the header of a file, the same before and after its digests are known. */
  headerBytes(file: StateFile): number {
    const bytes = this.#headerBytes.get(file.rank) ?? this.headerOf(file).length;
    this.#headerBytes.set(file.rank, bytes);
    return bytes;
  }

  /** Creates the folder and the files of the local ranks. */
  async prepare(own: readonly StateFile[], all: readonly StateFile[]): Promise<void> {
    const { folder } = this.#settings;
    await this.#agree(`${folderOf(this.#progress.steps)} is to be written`, () => {
      if (!this.#leads) return;
      makeFolder(folder);
      rmSync(this.#part, { recursive: true, force: true });
      expectSpace(
        folder,
        all.reduce((sum, { bytes }) => sum + bytes, 0),
      );
      mkdirSync(this.#part);
    });
    // a host that does not share the folder writes to its own; rank 0 then reports that files are missing
    makeFolder(this.#part);
    for (const file of own) {
      const fd = openSync(this.pathOf(file.rank), "w");
      try {
        writeSync(fd, this.headerOf(file), 0);
      } finally {
        closeSync(fd);
      }
    }
  }

  /** Adds what a writer found in a block of so many bytes. */
  add(rank: number, bytes: number, { digests, nonfinite }: BlockResult): void {
    this.#written += bytes;
    const own = this.#digests.get(rank) ?? new Map<string, string[]>();
    this.#digests.set(rank, own);
    for (const [tensor, part, digest] of digests) {
      const parts = own.get(tensor) ?? [];
      own.set(tensor, parts);
      parts[part] = digest;
    }
    for (const [tensor, count] of nonfinite) this.#nonfinite.set(tensor, (this.#nonfinite.get(tensor) ?? 0) + count);
  }

  /** Returns the error of a state with values that are NaN or infinite: a run cannot resume from it. */
  nonfinite(own: readonly StateFile[]): Error | undefined {
    for (const [tensor, count] of this.#nonfinite) {
      const entry = own.flatMap(({ entries }) => entries).find(({ name }) => name === tensor);
      return new Trouble(
        `no checkpoint of step ${this.#progress.steps}: ${tensor} holds ${count} of ${elementsOf(entry?.shape ?? [])} values that are NaN or infinite`,
        "resume from an earlier checkpoint, with a smaller learning rate",
      );
    }
    return undefined;
  }

  /** Waits for all ranks; rank 0 then makes the checkpoint complete and removes older ones. Returns its folder. */
  async commit(tensors: ReturnType<typeof stateFiles>["tensors"], files: ReadonlyMap<number, StateFile>): Promise<string> {
    const { plan, version, folder, keep } = this.#settings;
    const text = { rankc: version, job: plan.job, mesh: plan.mesh, progress: this.#progress, tensors };
    try {
      await this.#agree(`${folderOf(this.#progress.steps)} is written`, () => {
        if (this.problem) throw this.problem;
      });
      await this.#agree(`${folderOf(this.#progress.steps)} is complete`, () => {
        if (!this.#leads) return;
        commitCheckpoint({ part: this.#part, whole: this.#whole, text, files: [...files.keys()].map(fileOf) });
        if (keep !== undefined) removeOlder(folder, this.#progress.steps, keep);
      });
      return this.#whole;
    } catch (error) {
      if (this.#leads) rmSync(this.#part, { recursive: true, force: true });
      throw error;
    }
  }

  /**
   * Acts, and waits until all ranks have done so. If a file could not be written on one of them, it throws a SaveFault on all. Another error
   * ends the run, and its end reaches the other ranks.
   */
  async #agree(name: string, act: () => void | Promise<void>): Promise<void> {
    let own: SaveFault | undefined;
    try {
      await act();
    } catch (error) {
      const known = asFault(this.#whole, error);
      if (!(known instanceof SaveFault)) throw known;
      own = known;
    }
    const problem = await this.#settings.localRanks.meet?.(name, own?.message);
    if (own) throw own;
    if (problem !== undefined) throw new SaveFault(problem, "see the output of that rank");
  }
}

/** Returns an error of the file system as a SaveFault; any other error unchanged. */
function asFault(path: string, error: unknown): unknown {
  const known = unwritten(path, error);
  if (known === error || !(known instanceof Trouble)) return error;
  return new SaveFault(known.message, known.fix);
}

/** Throws the error of a full disk if the file system states too little free space. */
function expectSpace(folder: string, bytes: number): void {
  const { bavail, bsize, blocks } = statfsSync(folder);
  // some network file systems state no sizes
  if (blocks === 0 || bavail * bsize >= bytes) return;
  const text = (n: number): string => (n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`);
  throw new SaveFault(
    `${folder}: the disk has ${text(bavail * bsize)} free, and the checkpoint needs ${text(bytes)}`,
    "free some space, name a place on another disk, or keep fewer checkpoints (--keep)",
  );
}
