/** The row bounds of a rank: after each step the device's counts of rows are compared with the capacity of the plan. */
import type { Program } from "../../schemas/plan.ts";
import { capacityExceeded } from "../capacityExceeded.ts";
import { type CudaArenas, type DeviceRange, offsetPointer } from "./arenas.ts";
import type { Context, DevicePointer, Pinned, Stream } from "./driver.ts";
import type { RankStreams } from "./streams.ts";

interface Limit {
  readonly limit: Program["bounds"][number];
  /** Where the count is on the device. */
  readonly place: DeviceRange;
  /** Its index in pinned memory. */
  readonly index: number;
}

/** The bounds of one rank. */
export class RowBounds {
  readonly #context: Context;
  readonly #limits: readonly Limit[];
  /** The counts of a step side by side on the device, and in the host memory of two steps by turns: one may run behind the other. */
  readonly #gathered: { readonly at: DevicePointer; readonly copies: readonly [Pinned, Pinned] } | undefined;
  #turn: 0 | 1 = 0;

  constructor(context: Context, { bounds }: Program, arenas: CudaArenas) {
    this.#context = context;
    this.#limits = bounds.map((limit, index) => ({ limit, index, place: arenas.place(limit.needed, 0) }));
    const bytes = 4 * bounds.length;
    this.#gathered = bytes > 0 ? { at: context.alloc(bytes), copies: [context.pin(bytes), context.pin(bytes)] } : undefined;
  }

  /** Issues copies of the counts within a step, or its graph. */
  gather(streams: RankStreams): void {
    const gathered = this.#gathered;
    if (!gathered) return;
    for (const { place, index } of this.#limits)
      streams.run({ reads: [place.span], writes: [] }, undefined, (s) =>
        this.#context.copy(offsetPointer(gathered.at, 4 * index), place.at, 4, s),
      );
  }

  /** Issues the copy to the host behind a step. Returns a check: once the copy is complete, it throws a Trouble if a count exceeds its bound. */
  issueCopy(stream: Stream): (rank: number) => void {
    const gathered = this.#gathered;
    if (!gathered) return () => undefined;
    this.#turn = this.#turn === 0 ? 1 : 0;
    const copy = gathered.copies[this.#turn];
    this.#context.copyOut(copy.at, gathered.at, 4 * this.#limits.length, stream);
    return (rank) => this.#expectWithin(new Int32Array(copy.bytes), rank);
  }

  #expectWithin(counts: Int32Array, rank: number): void {
    for (const { limit, index } of this.#limits) {
      const found = counts[index];
      if (found !== undefined && found > limit.bound) throw capacityExceeded(limit, rank, found);
    }
  }

  close(): void {
    if (!this.#gathered) return;
    this.#context.free(this.#gathered.at);
    for (const copy of this.#gathered.copies) this.#context.unpin(copy);
  }
}
