/** The row bounds of a rank: after each step the device's counts of rows are compared with the capacity of the plan. */
import type { Program } from "../../schemas/plan.ts";
import { capacityExceeded } from "../capacityExceeded.ts";
import type { CudaArenas, DeviceRange } from "./arenas.ts";
import type { Context, Pinned } from "./driver.ts";
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
  readonly #counts: Pinned | undefined;

  constructor(context: Context, { bounds }: Program, arenas: CudaArenas) {
    this.#context = context;
    this.#limits = bounds.map((limit, index) => ({ limit, index, place: arenas.place(limit.needed, 0) }));
    this.#counts = bounds.length > 0 ? context.pin(4 * bounds.length) : undefined;
  }

  /** Issues the copies of the counts to the host. */
  issueCopies(streams: RankStreams): void {
    const counts = this.#counts;
    if (!counts) return;
    for (const { place, index } of this.#limits)
      streams.run({ reads: [place.span], writes: [] }, undefined, (s) =>
        this.#context.copyOut(counts.at + BigInt(4 * index), place.at, 4, s),
      );
  }

  /** Throws a Trouble if a count exceeds its bound. The copies must be complete. */
  expectWithin(rank: number): void {
    if (!this.#counts) return;
    const counts = new Int32Array(this.#counts.bytes);
    for (const { limit, index } of this.#limits) {
      const found = counts[index];
      if (found !== undefined && found > limit.bound) throw capacityExceeded(limit, rank, found);
    }
  }

  close(): void {
    if (this.#counts) this.#context.unpin(this.#counts);
  }
}
