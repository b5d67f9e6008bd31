/**
 * Saves checkpoints while training continues. The state is copied to blocks of host memory between two steps; writers take the blocks to
 * the disk during the next steps. When all ranks have written their files, rank 0 adds snapshot.json, checks the files, and renames the
 * folder: a checkpoint is complete, or it does not exist.
 */
import { availableParallelism } from "node:os";
import { setTimeout } from "node:timers/promises";
import { dtypes, encoded } from "../../schemas/dtypes.ts";
import type { Buffer, Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import type { CopyPiece, HostBlock, LocalRanks, StagingArea } from "../backend.ts";
import type { RunProgress } from "../train/stepParameters.ts";
import { type BlockWriters, openBlockWriters } from "./blockWriter.ts";
import { Save, type SaveProgress } from "./save.ts";
import { SaveMemory } from "./saveMemory.ts";
import { blocksOf, type StateBlock, type StateFile, stateFiles } from "./stateFiles.ts";

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
  /** Bytes of a tensor that have a digest of their own. */
  readonly digestBytes?: number;
}

/** How long training waited for a checkpoint, by reason. */
export interface StallParts {
  /** For the checkpoint before. */
  readonly previous: number;
  /** For memory. */
  readonly memory: number;
  /** For the copy of the state. */
  readonly copy: number;
}

/** A saved checkpoint. */
export interface Saved {
  readonly step: number;
  readonly folder: string;
  /** Bytes that this process wrote. */
  readonly bytes: number;
  /** How long training waited. */
  readonly stallSeconds: number;
  readonly stall: StallParts;
  /** Bytes of page-locked host memory that the saver of this process holds. */
  readonly pinnedBytes: number;
  /** From the beginning to the complete checkpoint. */
  readonly seconds: number;
}

/** A checkpoint whose state is copied. */
export interface PendingSave extends Pick<Saved, "step" | "bytes" | "stallSeconds" | "stall"> {
  /** Resolves when the checkpoint is complete. Rejects with a SaveFault if it was not saved, with another error if the run cannot continue. */
  readonly done: Promise<Saved>;
  /** Returns how many bytes this process has written, and the seconds since the begin. */
  written(): SaveProgress;
}

/** How long a run that failed waits for its pending save, in milliseconds. */
const PATIENCE = 4000;
const MIB = 2 ** 20;
const BLOCK = 32 * MIB;
/** A state below this size is written faster than threads start. */
const SMALL = 8 * MIB;
/** Bytes of a tensor that have a digest of their own: a rank reads and checks the parts that it needs. */
const DIGEST = 4 * MIB;
/** Saves the checkpoints of a run. */
export class CheckpointSaver {
  readonly #settings: SaverSettings & { readonly digestBytes: number };
  readonly #tensors: ReturnType<typeof stateFiles>["tensors"];
  readonly #files: ReturnType<typeof stateFiles>["files"];
  /** The files of the local ranks. */
  readonly #own: readonly StateFile[];
  readonly #bytes: number;
  readonly #threads: number;
  readonly #memory: SaveMemory;
  #writers: BlockWriters | undefined;
  #pending: Promise<unknown> = Promise.resolve();
  /** Whether the run waits for a pending save, and so reports its progress. */
  #isAwaited = false;

  constructor(settings: SaverSettings) {
    this.#settings = { digestBytes: DIGEST, ...settings };
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
    const [only, ...others] = this.#own;
    const device = only && others.length === 0 ? localRanks.rankDevice(only.rank) : undefined;
    this.#memory = new SaveMemory({ localRanks, device, size, wanted });
  }

  /** Allocates memory ahead of the first save, for about so many milliseconds. The device computes meanwhile, and nothing is captured. */
  prepare(milliseconds: number): void {
    this.#memory.prepare(milliseconds);
    if (this.#threads > 0) this.#writers ??= openBlockWriters(this.#threads);
  }

  /**
   * Begins a checkpoint: returns when the state has been copied. Waits first for the checkpoint before. All processes of a run call it
   * between the same two steps.
   */
  async begin(progress: RunProgress): Promise<PendingSave> {
    const begun = performance.now();
    await this.settled();
    const previous = secondsSince(begun);
    this.#settings.expectHeld?.();
    const save = new Save(this.#settings, progress);
    const threads = (this.#writers ??= openBlockWriters(this.#threads)).writers;
    const work: Promise<void>[] = [];
    const fail = (error: Error): void => void (save.problem ??= error);
    const prepared = save.prepare(this.#own, [...this.#files.values()]).catch(fail);
    let memory = 0;
    try {
      const asked = performance.now();
      const staging = this.#memory.staging();
      memory = secondsSince(asked);
      for (const file of this.#own) {
        const copied = await this.#copy({ save, file, writers: threads.length, prepared, staging });
        work.push(...copied.writes);
        memory += copied.memory;
      }
    } catch (error) {
      // the device failed: the run ends
      fail(error as Error);
      await Promise.all([prepared, ...work]);
      throw error;
    }
    const stallSeconds = secondsSince(begun);
    const copied = { stallSeconds, stall: { previous, memory, copy: stallSeconds - previous - memory } };
    const finished = async (): Promise<Saved> => {
      await Promise.all([prepared, ...work]);
      await this.#finish(save);
      const folder = await save.commit(this.#tensors, this.#files);
      const pinnedBytes = this.#settings.localRanks.hostMemory ? this.#memory.blocks.count * this.#memory.blocks.size : 0;
      return { step: progress.steps, folder, bytes: this.#bytes, ...copied, pinnedBytes, seconds: secondsSince(begun) };
    };
    const done = finished();
    this.#pending = done.catch(() => {});
    return { step: progress.steps, bytes: this.#bytes, ...copied, done, written: () => save.written() };
  }

  /**
   * Copies the state of a rank: as much as fits to the staging area, the rest to blocks of host memory. Returns the writes, which never
   * reject, and the seconds of waiting for host memory.
   */
  async #copy({ save, file, writers, prepared, staging }: CopyState): Promise<{ writes: Promise<void>[]; memory: number }> {
    const device = this.#settings.localRanks.rankDevice(file.rank);
    const copy = device.copyOut?.bind(device) ?? copyByReads((buffer) => device.read(buffer, 0));
    const copies: Promise<void>[] = [];
    const writes: Promise<void>[] = [];
    const { blocks: pool, most } = this.#memory;
    const blocks = blocksOf(file, pool.size, writers);
    const staged = blocks.splice(Math.max(0, blocks.length - Math.floor((staging?.bytes ?? 0) / pool.size)));
    for (const [i, { pieces }] of staged.entries()) staging?.put(pieces, i * pool.size);
    let memory = 0;
    for (const block of blocks) {
      const asked = performance.now();
      const to = await pool.take(most);
      memory += secondsSince(asked);
      const copied = copy(block.pieces, to);
      copies.push(copied);
      writes.push(this.#writeAfter(Promise.all([copied, prepared]), save, file, block, to));
      // `read` returns one buffer after the other
      if (!device.copyOut) await copied;
    }
    await Promise.all(copies);
    await staging?.filled();
    if (staging && staged.length > 0) writes.push(this.#drain(save, file, staged, staging, prepared));
    return { writes, memory };
  }

  /** Takes blocks from the staging area to the disk while steps run; never rejects. */
  async #drain(save: Save, file: StateFile, blocks: readonly StateBlock[], staging: StagingArea, prepared: Promise<void>): Promise<void> {
    const { blocks: pool } = this.#memory;
    const writes: Promise<void>[] = [];
    await prepared;
    for (const [i, block] of blocks.entries()) {
      if (save.problem) break;
      const to = await pool.take();
      const copied = staging.copyOut(i * pool.size, bytesIn(block), to);
      writes.push(this.#writeAfter(copied, save, file, block, to));
      await copied.catch(() => {});
    }
    await Promise.all(writes);
  }

  /** Writes a block when its content is there, and gives its memory back; never rejects. */
  async #writeAfter(copied: Promise<unknown>, save: Save, file: StateFile, block: StateBlock, memory: HostBlock): Promise<void> {
    try {
      await copied;
      if (!save.problem) await this.#write(save, file, block, memory);
    } catch (error) {
      save.problem ??= error as Error;
    } finally {
      this.#memory.blocks.give(memory);
    }
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
    this.#memory.closeStaging();
    await this.#writers?.close();
    if (isSettled) this.#memory.blocks.close();
  }

  async #write(save: Save, file: StateFile, { writer, at, pieces }: StateBlock, memory: HostBlock): Promise<void> {
    const path = save.pathOf(file.rank);
    const own = pieces.map(({ tensor, dtype, from, bytes, last }) => ({ tensor, dtype, from, bytes, last }));
    const { digestBytes } = this.#settings;
    const task = { kind: "block", path, at: save.headerBytes(file) + at, memory: memory.address, pieces: own, digestBytes } as const;
    const found = await this.#perform(writer, task);
    if (this.#isAwaited) this.#settings.localRanks.report?.(`writing ${path}`);
    save.add(file.rank, bytesIn({ pieces }), found);
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

/** The copy of a rank's state. */
interface CopyState {
  readonly save: Save;
  readonly file: StateFile;
  readonly writers: number;
  /** Resolves when the files exist. */
  readonly prepared: Promise<void>;
  readonly staging: StagingArea | undefined;
}

const secondsSince = (begun: number): number => (performance.now() - begun) / 1000;
const bytesIn = ({ pieces }: Pick<StateBlock, "pieces">): number => pieces.reduce((sum, { bytes }) => sum + bytes, 0);

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
