/**
 * Device memory for a copy of the checkpoint state. Training waits while the device copies the state there, at the rate of its own memory; a
 * stream of its own copies it to the host during the next steps.
 */
import { setImmediate } from "node:timers/promises";
import type { CopyPiece, HostBlock, StagingArea } from "../backend.ts";
import { type CudaArenas, offsetPointer } from "./arenas.ts";
import type { Context, DevicePointer, Event, Stream } from "./driver.ts";
import type { Steps } from "./graph.ts";
import type { RankStreams } from "./streams.ts";
import type { Waits } from "./waits.ts";

/** What a staging area uses of a rank. */
interface StagingParts {
  readonly context: Context;
  readonly streams: RankStreams;
  readonly arenas: CudaArenas;
  readonly steps: Steps;
  readonly waits: Waits;
}

/** Device memory that stays free, as a fraction of all: graphs and libraries allocate later. */
const RESERVE = 0.03;

/** Allocates a staging area as RankDevice.openStaging states. */
export function openStaging(parts: StagingParts, most: number, unit: number): StagingArea | undefined {
  const { context } = parts;
  const { free, total } = context.memory();
  const bytes = Math.floor(Math.min(most, free - RESERVE * total) / unit) * unit;
  if (bytes <= 0) return undefined;
  try {
    return new CudaStaging(parts, context.alloc(bytes), bytes);
  } catch {
    // another process took the memory: the state is copied without a staging area
    return undefined;
  }
}

/** Issues copies of pieces of buffers, as they are after all preceding calls; `copy` issues one of them. Throws within a step. */
export function copyPieces(
  { streams, arenas, steps }: Pick<StagingParts, "streams" | "arenas" | "steps">,
  pieces: readonly CopyPiece[],
  copy: (piece: CopyPiece, from: DevicePointer, stream: Stream) => void,
): void {
  if (steps.mode) throw new Error("rankc: the state is copied between two steps");
  const places = pieces.map((piece) => ({ piece, device: arenas.place(piece.buffer.id, 0) }));
  streams.run({ reads: places.map(({ device }) => device.span), writes: [] }, undefined, (stream) => {
    for (const { piece, device } of places) copy(piece, offsetPointer(device.at, piece.from), stream);
  });
}

class CudaStaging implements StagingArea {
  readonly bytes: number;
  readonly #parts: StagingParts;
  readonly #at: DevicePointer;
  readonly #filled: Event;
  readonly #copied: Event;
  readonly #stream;
  #isClosed = false;

  constructor(parts: StagingParts, at: DevicePointer, bytes: number) {
    const { context } = parts;
    this.bytes = bytes;
    this.#parts = parts;
    this.#at = at;
    this.#filled = context.createEvent("order");
    this.#copied = context.createEvent("order");
    this.#stream = context.createStream();
  }

  put(pieces: readonly CopyPiece[], to: number): void {
    const { context } = this.#parts;
    copyPieces(this.#parts, pieces, ({ at, bytes }, from, stream) => context.copy(offsetPointer(this.#at, to + at), from, bytes, stream));
  }

  async filled(): Promise<void> {
    const { context, streams } = this.#parts;
    context.record(this.#filled, streams.compute.stream);
    await this.#happens(this.#filled);
  }

  async copyOut(from: number, bytes: number, { address }: HostBlock): Promise<void> {
    const { context } = this.#parts;
    if (typeof address !== "bigint") throw new Error("rankc: the state is copied to pinned memory");
    await this.#idle();
    context.copyOut(address, offsetPointer(this.#at, from), bytes, this.#stream);
    context.record(this.#copied, this.#stream);
    await this.#happens(this.#copied);
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    const { context } = this.#parts;
    context.synchronize(this.#stream);
    context.destroyStream(this.#stream);
    for (const event of [this.#filled, this.#copied]) context.destroyEvent(event);
    context.free(this.#at);
  }

  async #happens(event: Event): Promise<void> {
    for (;;) {
      await this.#idle();
      if (this.#parts.context.happened(event)) return;
      this.#parts.waits.check();
      await setImmediate();
    }
  }

  /** Waits until no step is captured: the driver refuses other calls of this thread meanwhile. */
  async #idle(): Promise<void> {
    while (this.#parts.steps.mode === "capture" && !this.#isClosed) await setImmediate();
    if (this.#isClosed) throw new Error("rankc: the run ended while the state was copied");
  }
}
