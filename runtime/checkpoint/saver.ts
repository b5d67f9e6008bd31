/**
 * Saves checkpoints while training continues. The state is copied to blocks of host memory between two steps; writers take the blocks to
 * the disk during the next steps. When all ranks have written their files, rank 0 adds snapshot.json, checks the files, and renames the
 * folder: a checkpoint is complete, or it does not exist.
 */
import { closeSync, mkdirSync, openSync, rmSync, statfsSync, writeSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { dtypes, encoded } from "../../schemas/dtypes.ts";
import type { Buffer, Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import type { CopyPiece, HostBlock, LocalRanks } from "../backend.ts";
import type { RunProgress } from "../train/stepParameters.ts";
import { type BlockWriters, openBlockWriters } from "./blockWriter.ts";
import { commitCheckpoint, removeOlder, SaveFault } from "./commit.ts";
import { HostBlocks } from "./hostBlocks.ts";
import { folderOf } from "./saveFolder.ts";
import { blocksOf, fileOf, headerFor, type StateBlock, type StateFile, stateFiles } from "./stateFiles.ts";

/** What a saver needs of a run. */
export interface SaverSettings {
  readonly plan: Plan;
  readonly folder: string;
  /** The version of rankc. */
  readonly version: string;
  readonly localRanks: Pick<LocalRanks, "ranks" | "rankDevice" | "hostMemory" | "meet" | "report">;
  /** Complete checkpoints to keep; undefined: all. */
  readonly keep?: number;
  /** Throws a Trouble if the folder no longer belongs to this run. */
  readonly expectHeld?: () => void;
  /** Threads that write; 0: none, the run waits for the disk. Default: by the bytes of the state. */
  readonly threads?: number;
  /** Bytes of a block. */
  readonly blockBytes?: number;
}

/** A saved checkpoint. */
export interface Saved {
  readonly step: number;
  readonly folder: string;
  /** Bytes that this process wrote. */
  readonly bytes: number;
  /** How long training waited. */
  readonly stallSeconds: number;
  /** From the beginning to the complete checkpoint. */
  readonly seconds: number;
}

/** A checkpoint whose state is copied. */
export interface PendingSave extends Pick<Saved, "step" | "bytes" | "stallSeconds"> {
  /** Resolves when the checkpoint is complete. Rejects with a SaveFault if it was not saved, with another error if the run cannot continue. */
  readonly done: Promise<Saved>;
}

/** How long a run that failed waits for its pending save, in milliseconds. */
const PATIENCE = 4000;
const MIB = 2 ** 20;
const BLOCK = 64 * MIB;
/** A state below this size is written faster than threads start. */
const SMALL = 8 * MIB;

/** Saves the checkpoints of a run. */
export class CheckpointSaver {
  readonly #settings: SaverSettings;
  readonly #tensors: ReturnType<typeof stateFiles>["tensors"];
  readonly #files: ReturnType<typeof stateFiles>["files"];
  /** The files of the local ranks. */
  readonly #own: readonly StateFile[];
  readonly #bytes: number;
  readonly #threads: number;
  readonly #blocks: HostBlocks;
  #writers: BlockWriters | undefined;
  #pending: Promise<unknown> = Promise.resolve();
  /** Whether the run waits for a pending save, and so reports its progress. */
  #isAwaited = false;

  constructor(settings: SaverSettings) {
    this.#settings = settings;
    const { plan, localRanks } = settings;
    const { tensors, files } = stateFiles(plan);
    this.#tensors = tensors;
    this.#files = files;
    this.#own = localRanks.ranks.flatMap((rank) => files.get(rank) ?? []);
    this.#bytes = this.#own.reduce((sum, { bytes }) => sum + bytes, 0);
    this.#threads = settings.threads ?? (this.#bytes < SMALL ? 0 : Math.max(1, Math.min(4, availableParallelism() - 1)));
    const size = settings.blockBytes ?? Math.max(4096, Math.min(BLOCK, Math.ceil(this.#bytes / 4096) * 4096));
    // each file ends with a partial block, and each writer's part of it
    const wanted = Math.ceil(this.#bytes / size) + this.#own.length * Math.max(1, this.#threads);
    const room = Math.floor(process.availableMemory() / 2 / processesHere() / size);
    this.#blocks = new HostBlocks(size, Math.min(wanted, room), localRanks.hostMemory);
  }

  /** Allocates pinned memory ahead of the first save, one block or as many as `milliseconds` allow. */
  prepare(milliseconds: number): void {
    if (!this.#settings.localRanks.hostMemory) return;
    const end = performance.now() + milliseconds;
    while (this.#blocks.grow() && performance.now() < end);
  }

  /**
   * Begins a checkpoint: returns when the state has been copied. Waits first for the checkpoint before. All processes of a run call it
   * between the same two steps.
   */
  async begin(progress: RunProgress): Promise<PendingSave> {
    const begun = performance.now();
    await this.settled();
    this.#settings.expectHeld?.();
    const save = new Save(this.#settings, progress);
    const threads = (this.#writers ??= openBlockWriters(this.#threads)).writers;
    const work: Promise<void>[] = [];
    const fail = (error: Error): void => void (save.problem ??= error);
    const prepared = save.prepare(this.#own, [...this.#files.values()]).catch(fail);
    try {
      for (const file of this.#own) work.push(...(await this.#copy(save, file, threads.length, prepared)));
    } catch (error) {
      // the device failed: the run ends
      fail(error as Error);
      await Promise.all([prepared, ...work]);
      throw error;
    }
    const stallSeconds = (performance.now() - begun) / 1000;
    const finished = async (): Promise<Saved> => {
      await Promise.all([prepared, ...work]);
      await this.#finish(save);
      const folder = await save.commit(this.#tensors, this.#files);
      return { step: progress.steps, folder, bytes: this.#bytes, stallSeconds, seconds: (performance.now() - begun) / 1000 };
    };
    const done = finished();
    this.#pending = done.catch(() => {});
    return { step: progress.steps, bytes: this.#bytes, stallSeconds, done };
  }

  /** Copies the state of a rank. Returns the writes of its blocks, which never reject. */
  async #copy(save: Save, file: StateFile, writers: number, prepared: Promise<void>): Promise<Promise<void>[]> {
    const device = this.#settings.localRanks.rankDevice(file.rank);
    const copy = device.copyOut?.bind(device) ?? copyByReads((buffer) => device.read(buffer, 0));
    const copies: Promise<void>[] = [];
    const writes: Promise<void>[] = [];
    for (const block of blocksOf(file, this.#blocks.size, writers)) {
      const memory = await this.#blocks.take();
      const copied = copy(block.pieces, memory);
      copies.push(copied);
      const write = async (): Promise<void> => {
        try {
          await Promise.all([copied, prepared]);
          if (!save.problem) await this.#write(save, file, block, memory);
        } catch (error) {
          save.problem ??= error as Error;
        } finally {
          this.#blocks.give(memory);
        }
      };
      writes.push(write());
      // `read` returns one buffer after the other
      if (!device.copyOut) await copied;
    }
    await Promise.all(copies);
    return writes;
  }

  /** Waits until no save is pending; never throws. */
  async settled(): Promise<void> {
    this.#isAwaited = true;
    await this.#pending;
    this.#isAwaited = false;
  }

  /**
   * Ends the writers and frees the memory. Waits for a pending save; after an error of the run for a short time only, because other ranks
   * may never write their part. The memory then stays until the process ends, as a writer may still read it.
   */
  async close(error?: Error): Promise<void> {
    let isSettled = false;
    const settled = this.settled().then(() => {
      isSettled = true;
    });
    if (!error) await settled;
    for (let waited = 0; !isSettled && waited < PATIENCE; waited += 20) await setTimeout(20);
    await this.#writers?.close();
    if (isSettled) this.#blocks.close();
  }

  async #write(save: Save, file: StateFile, { writer, at, pieces }: StateBlock, memory: HostBlock): Promise<void> {
    const path = save.pathOf(file.rank);
    const header = save.headerOf(file).length;
    const own = pieces.map(({ tensor, dtype, bytes, last }) => ({ tensor, dtype, bytes, last }));
    const task = { kind: "block", path, at: header + at, memory: memory.address, pieces: own } as const;
    const { digests, nonfinite } = await this.#perform(writer, task);
    if (this.#isAwaited) this.#settings.localRanks.report?.(`writing ${path}`);
    save.add(file.rank, digests, nonfinite);
  }

  /** Writes the headers; a save that failed is forgotten by the writers. */
  async #finish(save: Save): Promise<void> {
    try {
      save.problem ??= save.nonfinite(this.#own);
      if (!save.problem)
        await Promise.all(
          this.#own.map((file, i) => {
            const task = { kind: "finish", path: save.pathOf(file.rank), header: save.headerOf(file) } as const;
            return this.#perform(i % Math.max(1, this.#threads), task);
          }),
        );
    } catch (error) {
      save.problem ??= error as Error;
    }
    if (save.problem) await Promise.all(Array.from({ length: Math.max(1, this.#threads) }, (_, i) => this.#perform(i, { kind: "forget" })));
  }

  #perform(writer: number, task: Parameters<BlockWriters["writers"][number]["perform"]>[0]) {
    const found = this.#writers?.writers[writer];
    if (!found) throw new Error(`rankc: there is no writer ${writer}`);
    return found.perform(task);
  }
}

/** Processes of the run on this host, as the launcher says. */
const processesHere = (): number => Math.max(1, Number(process.env.LOCAL_WORLD_SIZE) || 1);

/** Returns a copy to a block for a device that only has `read`. Consecutive pieces of a buffer are read once. */
function copyByReads(read: (buffer: Buffer) => Promise<Float32Array | Int32Array>) {
  let last: { readonly buffer: Buffer; readonly bytes: Uint8Array } | undefined;
  return async (pieces: readonly CopyPiece[], block: HostBlock): Promise<void> => {
    for (const { buffer, from, bytes, at } of pieces) {
      if (last?.buffer !== buffer) {
        const { words } = encoded(buffer.dtype, await read(buffer));
        last = { buffer, bytes: new Uint8Array(words.buffer, words.byteOffset, words.byteLength) };
        const expected = elementsOf(buffer.shape) * dtypes[buffer.dtype].bytes;
        if (last.bytes.length !== expected) throw new Error(`rankc: ${buffer.id} has ${last.bytes.length} bytes, not ${expected}`);
      }
      block.bytes.set(last.bytes.subarray(from, from + bytes), at);
    }
  };
}

/** One checkpoint under way. */
class Save {
  /** The first error; the checkpoint is then given up. */
  problem: Error | undefined;
  readonly #settings: SaverSettings;
  readonly #progress: RunProgress;
  readonly #whole: string;
  readonly #part: string;
  readonly #leads: boolean;
  readonly #digests = new Map<number, Map<string, string>>();
  readonly #nonfinite = new Map<string, number>();

  constructor(settings: SaverSettings, progress: RunProgress) {
    this.#settings = settings;
    this.#progress = progress;
    this.#whole = join(settings.folder, folderOf(progress.steps));
    this.#part = `${this.#whole}.part`;
    this.#leads = settings.localRanks.ranks.includes(0);
  }

  pathOf(rank: number): string {
    return join(this.#part, fileOf(rank));
  }

  headerOf(file: StateFile): Uint8Array {
    return headerFor(file, this.#progress.steps, this.#digests.get(file.rank));
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
        writeSync(fd, headerFor(file, this.#progress.steps), 0);
      } finally {
        closeSync(fd);
      }
    }
  }

  add(rank: number, digests: readonly (readonly [string, string])[], nonfinite: readonly (readonly [string, number])[]): void {
    const own = this.#digests.get(rank) ?? new Map<string, string>();
    this.#digests.set(rank, own);
    for (const [tensor, digest] of digests) own.set(tensor, digest);
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
