/** Memory of the inputs of steps: pinned memory for steps that are issued call by call, and memory of replays by turns. */
import { offsetPointer } from "./arenas.ts";
import type { Context, DevicePointer, Pinned, Stream } from "./driver.ts";

/** The smallest allocation of pinned memory in bytes: page-locking costs far more than a write. */
const pinnedAtOnce = 1 << 20;

/** Where the host writes an input of a step, and what the step's copy of it reads. */
export interface Staged {
  readonly memory: ArrayBuffer;
  readonly offset: number;
  /** A host address; in a graph device memory. */
  readonly source: { readonly kind: "host"; readonly at: bigint } | { readonly kind: "device"; readonly at: DevicePointer };
}

/** Returns the bytes that an input of so many bytes takes. */
export const alignedBytes = (bytes: number): number => Math.ceil(bytes / 16) * 16;

/**
 * The inputs of replayed steps. The host writes two pinned blocks by turns, so that it writes one while a step under way may still read the
 * other. A copy in front of each replay, behind the replay before it, brings them to the device memory that the graph reads.
 */
export class ReplayInputs {
  readonly #context: Context;
  readonly #bytes: number;
  readonly #device: DevicePointer;
  readonly #blocks: readonly [Pinned, Pinned];
  #turn: 0 | 1 = 0;

  /** `bytes`: of all inputs. */
  constructor(context: Context, bytes: number) {
    this.#context = context;
    this.#bytes = bytes;
    const held = Math.max(16, bytes);
    this.#device = context.alloc(held);
    this.#blocks = [context.pin(held), context.pin(held)];
  }

  /** Begins the inputs of the next replay. */
  turn(): void {
    this.#turn = this.#turn === 0 ? 1 : 0;
  }

  /** Returns where the input at `offset` is written, and where the graph reads it. */
  at(offset: number): Staged {
    const memory = this.#blocks[this.#turn].bytes;
    return { memory, offset, source: { kind: "device", at: offsetPointer(this.#device, offset) } };
  }

  /** Issues the copy to the device. */
  issueCopy(stream: Stream): void {
    if (this.#bytes > 0) this.#context.copyIn(this.#device, this.#blocks[this.#turn].at, this.#bytes, stream);
  }

  close(): void {
    this.#context.free(this.#device);
    for (const block of this.#blocks) this.#context.unpin(block);
  }
}

/** Pinned memory that is handed out piece by piece. */
export class PinnedPool {
  readonly #context: Context;
  readonly #blocks: Pinned[] = [];
  /** Bytes of the last block that are in use. */
  #used = 0;

  constructor(context: Context) {
    this.#context = context;
  }

  take(bytes: number): Staged {
    const aligned = alignedBytes(bytes);
    const block = this.#blockWith(aligned);
    const offset = this.#used;
    this.#used += aligned;
    return { memory: block.bytes, offset, source: { kind: "host", at: block.at + BigInt(offset) } };
  }

  /** Takes back all pieces, and keeps the first block. */
  recycle(): void {
    const [first, ...others] = this.#blocks.splice(0);
    for (const memory of others) this.#context.unpin(memory);
    if (first) this.#blocks.push(first);
    this.#used = 0;
  }

  close(): void {
    for (const memory of this.#blocks) this.#context.unpin(memory);
  }

  #blockWith(bytes: number): Pinned {
    const last = this.#blocks.at(-1);
    if (last && this.#used + bytes <= last.bytes.byteLength) return last;
    const block = this.#context.pin(Math.max(bytes, pinnedAtOnce));
    this.#blocks.push(block);
    this.#used = 0;
    return block;
  }
}
