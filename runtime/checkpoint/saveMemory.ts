/**
 * The memory through which the state of a process goes to the disk. With room on the device for a copy of the state, training waits for that
 * copy alone, and a ring of blocks of host memory takes it to the disk. What does not fit there is copied to host memory while training
 * waits: that needs as many blocks as it has bytes.
 */
import type { LocalRanks, RankDevice, StagingArea } from "../backend.ts";
import { HostBlocks } from "./hostBlocks.ts";

/** What the memory of a saver is made for. */
interface SaveMemorySettings {
  readonly localRanks: Pick<LocalRanks, "hostMemory">;
  /** The device whose state is saved, if the process has one rank. */
  readonly device: RankDevice | undefined;
  /** Bytes of a block. */
  readonly size: number;
  /** Blocks of the whole state. */
  readonly wanted: number;
}

/** Blocks between a staging area and the disk: each writer has one, and others are filled. */
const RING = 16;
/** Blocks without which a copy from a staging area does not begin. */
const LEAST = 4;
/** Calls of `prepare` before the staging area is opened: graphs, and libraries that begin with the first step, have their memory by then. */
const STEPS_BEFORE_STAGING = 4;

/** Blocks of host memory, and a staging area if the device has room. */
export class SaveMemory {
  readonly blocks: HostBlocks;
  readonly #settings: SaveMemorySettings;
  /** Blocks that half of the host's available memory holds. */
  readonly #room: number;
  #staging: StagingArea | undefined;
  #isOpen = false;
  #prepared = 0;

  constructor(settings: SaveMemorySettings) {
    const { size, localRanks } = settings;
    this.#settings = settings;
    this.#room = Math.floor(process.availableMemory() / 2 / processesHere() / size);
    this.blocks = new HostBlocks(size, localRanks.hostMemory);
  }

  /**
   * Allocates pinned memory while the device computes, one block or as many as end within `milliseconds` if they take as long as the
   * slowest of this call: it takes about a second for a gigabyte, and the calls of the next step come after it.
   */
  prepare(milliseconds: number): void {
    if (!this.#settings.localRanks.hostMemory) return;
    if (++this.#prepared > STEPS_BEFORE_STAGING) this.#open();
    const most = this.#isOpen ? this.most : Math.min(RING, this.most);
    const begun = performance.now();
    let [slowest, now] = [0, begun];
    while (now + slowest < begun + milliseconds && this.blocks.grow(most)) {
      const last = now;
      now = performance.now();
      slowest = Math.max(slowest, now - last);
    }
  }

  /** Returns the staging area, opened on first use; undefined if there is none. Allocates the blocks without which it is of no use. */
  staging(): StagingArea | undefined {
    this.#open();
    while (this.#staging && this.blocks.grow(Math.min(LEAST, this.most)));
    return this.#staging;
  }

  /** The most blocks of host memory. */
  get most(): number {
    const { wanted, size } = this.#settings;
    const staged = Math.min(wanted, (this.#staging?.bytes ?? 0) / size);
    return Math.max(2, Math.min(this.#room, wanted - staged + Math.min(RING, staged)));
  }

  /** Frees the staging area. A copy from it that is under way ends with an error. */
  closeStaging(): void {
    try {
      this.#staging?.close();
    } catch {
      // the device failed, and its driver frees the memory
    }
    this.#staging = undefined;
  }

  #open(): void {
    const { device, wanted, size } = this.#settings;
    if (this.#isOpen) return;
    this.#isOpen = true;
    this.#staging = device?.openStaging?.(wanted * size, size);
  }
}

/** Processes of the run on this host, as the launcher says. */
const processesHere = (): number => Math.max(1, Number(process.env.LOCAL_WORLD_SIZE) || 1);
