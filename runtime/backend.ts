/**
 * The interfaces of the runtime. A Backend owns the memory of one rank and runs ops there; a Comm moves buffers between
 * ranks; a Fleet is the ranks that one process runs on one kind of device. `execute` walks programs through them and knows
 * no device.
 */
import type { Buffer, Collective, Compute, Transfer } from "../schemas/plan.ts";
import type { Timing } from "../schemas/timing.ts";

/** Values of a buffer as the host sees them: bf16 and f16 arrive and leave as f32. */
export type HostData = Float32Array | Int32Array;

/** Calls are issued in order and done in order; only `read` waits for them. */
export interface RankDevice {
  /** Sets gradients and metric accumulators to zero: the start of a step. */
  zeroGradients(): void;
  /** Runs one op. `slot` says which copy of the activations. */
  compute(i: Compute, copy: number): void;
  write(buffer: Buffer, copy: number, data: HostData): void;
  /** A copy of what the buffer holds when all that was issued before is done. */
  read(buffer: Buffer, copy: number): Promise<HostData>;
}

/** A backend whose memory is the host's: it can look at it where it lies. */
export interface HostRankDevice extends RankDevice {
  peek(buffer: Buffer, copy: number): HostData;
}

/** Where a rank stands: the block (`F3`, `B0.1`, `step`), its microbatch (−1 in the step block), and the copy of the activations it works on. */
export interface BlockPosition {
  readonly tag: string;
  readonly microbatch: number;
  readonly copy: number;
}

/**
 * Collectives on contiguous buffers; groups are the plan's, their members in ascending order of rank. With g members:
 * all_gather [n] → [g,n]; reduce_scatter [g,n] → [n], sums in the order of members; all_to_all [g,n] → [g,n], block i of
 * member j becomes block j of member i; all_reduce and all_reduce_max [n] → [n]; shift [n] → [n], what member i has goes to
 * member i + 1, of the last to the first. Source and destination may begin at the
 * same byte.
 */
export interface Comm {
  /** True once the move has been issued for this rank; false while members of its group have not arrived. Asked again after each false. */
  collective(rank: number, i: Collective, at: BlockPosition): boolean;
  send(rank: number, i: Transfer, at: BlockPosition): void;
  /** False while nothing has arrived. */
  recv(rank: number, i: Transfer, at: BlockPosition): boolean;
}

export interface LocalRanks {
  readonly ranks: readonly number[];
  rankDevice(rank: number): RankDevice;
  readonly comm: Comm;
  /** The first call of a step of so many microbatches, where a fleet has it. True: the step is replayed as it was issued before; only its writes count. */
  beginStep?(microbatches: number): boolean;
  /** What ran when in the last step, of a fleet opened for that. */
  profile?(): Promise<readonly Timing[]> | readonly Timing[];
  /** Hands over what was issued and waits until it is done. Throws what went wrong on the way. */
  finish(): Promise<void>;
  /** Where ranks of other processes run along: whether all begin another step. */
  mayBegin?(): boolean;
  /** … and asks that they stop after this one, all after the same. */
  stop?(): void;
  /** … and adds up, over the stages, numbers that each stage's first rank knows. */
  combine?(values: readonly number[]): Promise<number[]>;
  /** … and waits until all of them have come to the place of this name. */
  meet?(name: string): Promise<void>;
  /** With what went wrong, if something did: the others are told. */
  close(error?: Error): Promise<void>;
}
