/**
 * The two interfaces of the runtime. A Backend owns the memory of one rank and runs ops there; a Comm moves pieces between
 * ranks. `execute` walks a program through both and knows neither.
 */
import type { Buffer, Compute, Move, Transfer } from "../schemas/plan.ts";

/** Values of a buffer as the host sees them: bf16 arrives and leaves as f32. */
export type HostData = Float32Array | Int32Array;

export interface Backend {
  /** Sets gradients and metric accumulators to zero: the start of a step. */
  zeroGradients(): void;
  /** Runs one op. `slot` says which copy of the activations. */
  compute(i: Compute, slot: number): void;
  /** A move that concerns this rank alone (`slice`). */
  read(buffer: Buffer, slot: number): HostData;
  write(buffer: Buffer, slot: number, data: HostData): void;
}

/** Where a rank stands: the block and microbatch (`F3`, `B0`, `step`), and the copy of the activations it works on. */
export interface Position {
  readonly tag: string;
  readonly slot: number;
}

export interface Comm {
  /** True once the move has happened for this rank; false while members of its group have not arrived. Asked again after each false. */
  move(rank: number, i: Move, at: Position): boolean;
  send(rank: number, i: Transfer, at: Position): void;
  /** False while nothing has arrived. */
  recv(rank: number, i: Transfer, at: Position): boolean;
}
