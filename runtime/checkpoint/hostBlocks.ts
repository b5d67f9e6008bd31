/**
 * Blocks of host memory that devices copy the checkpoint state to and writers read. With room for the whole state, training waits for the
 * copies alone; with less, a copy waits until a block has been written.
 */
import type { HostBlock, HostMemory } from "../backend.ts";

/** Host memory that threads of this process share. */
const sharedMemory: HostMemory = {
  allocate(bytes) {
    const memory = new SharedArrayBuffer(bytes);
    return { bytes: new Uint8Array(memory), address: memory };
  },
  free: () => {},
};

/** A pool of blocks of one size. */
export class HostBlocks {
  /** Bytes of a block. */
  readonly size: number;
  readonly #memory: HostMemory;
  readonly #all: HostBlock[] = [];
  readonly #free: HostBlock[] = [];
  readonly #waiting: ((block: HostBlock) => void)[] = [];

  /** Default of `memory`: memory that threads share. */
  constructor(size: number, memory: HostMemory = sharedMemory) {
    this.size = size;
    this.#memory = memory;
  }

  /** The number of blocks. */
  get count(): number {
    return this.#all.length;
  }

  /** Returns a free block; allocates one while fewer than `most` exist; otherwise waits for one. */
  take(most = 0): Promise<HostBlock> {
    const block = this.#free.pop() ?? this.#allocate(most);
    return block ? Promise.resolve(block) : new Promise((resolve) => this.#waiting.push(resolve));
  }

  /** Gives a block back. */
  give(block: HostBlock): void {
    const next = this.#waiting.shift();
    if (next) next(block);
    else this.#free.push(block);
  }

  /** Allocates one block ahead of need. Returns false if there are `most`. */
  grow(most: number): boolean {
    const block = this.#allocate(most);
    if (block) this.give(block);
    return block !== undefined;
  }

  /** Frees all blocks. No copy and no write may be under way. */
  close(): void {
    for (const block of this.#all.splice(0)) this.#memory.free(block);
    this.#free.length = 0;
  }

  #allocate(most: number): HostBlock | undefined {
    if (this.#all.length >= most) return undefined;
    const block = this.#memory.allocate(this.size);
    this.#all.push(block);
    return block;
  }
}
