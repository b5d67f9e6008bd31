/**
 * The interfaces of the runtime. A RankDevice owns the memory of one rank and runs ops there; a Comm moves buffers between ranks;
 * LocalRanks are the ranks that one process runs on one kind of device. The training loop (train/loop.ts) uses only these interfaces.
 */
import type { Buffer, Collective, Compute, Transfer } from "../schemas/plan.ts";
import type { Timing } from "../schemas/timing.ts";

/** Values of a buffer on the host; bf16 and f16 are converted to f32. */
export type HostData = Float32Array | Int32Array;

/** A block of host memory that a device copies to. */
export interface HostBlock {
  readonly bytes: Uint8Array;
  /** Where other threads of the process find it: shared memory, or the address of pinned memory. */
  readonly address: SharedArrayBuffer | bigint;
}

/** Allocates host memory that a device copies to at full speed. */
export interface HostMemory {
  allocate(bytes: number): HostBlock;
  free(block: HostBlock): void;
}

/** A copy of `bytes` of a buffer, from byte `from` of the buffer to byte `at` of a block. */
export interface CopyPiece {
  readonly buffer: Buffer;
  readonly from: number;
  readonly bytes: number;
  readonly at: number;
}

/**
 * A shard as rows within planes: element [plane, row, column] of the shard is element
 * `base` + plane · `planeStride` + row · `rowStride` + column of the whole tensor.
 */
export interface ShardBox {
  /** Rows of all planes. */
  readonly rows: number;
  /** Rows of a plane. */
  readonly height: number;
  /** Elements of a row. */
  readonly width: number;
  readonly rowStride: number;
  readonly planeStride: number;
  readonly base: number;
}

/** A shard of initial weights of a normal distribution (src/ops/normalDraw.ts). */
export interface NormalDraw {
  /** The key of the whole tensor. */
  readonly key: readonly [number, number];
  readonly std: number;
  readonly box: ShardBox;
}

/** Buffers that hold the same shard in different types. */
export type WeightTarget = readonly Buffer[];

/**
 * Elements [row, column] of a tensor, with `stride` elements from row to row, that become the elements `to` + row · `rowStep` +
 * column · `columnStep` of a shard.
 */
export interface ElementPiece {
  readonly tensor: { readonly dtype: string };
  readonly rows: number;
  readonly columns: number;
  readonly stride: number;
  readonly to: number;
  readonly rowStep: number;
  readonly columnStep: number;
}

/** A piece of a block of host memory: where its bytes begin in the block, what it becomes part of, and its number in messages. */
export interface PlacedPiece {
  readonly piece: ElementPiece;
  readonly offset: number;
  readonly target: WeightTarget;
  readonly id: number;
}

/** Blocks of host memory from which a device takes weights, converts them and writes them to buffers. */
export interface WeightLoader {
  readonly blocks: number;
  readonly blockBytes: number;
  /** Returns the memory of a block when the device has read its last content. */
  free(block: number): Promise<HostBlock>;
  /** Begins to write the pieces of a block, of which so many bytes are filled. */
  place(block: number, bytes: number, pieces: readonly PlacedPiece[]): void;
  /** Waits until all pieces are written. Returns the least number of a piece with a value that is not finite; undefined if there is none. */
  finish(): Promise<number | undefined>;
  close(): void;
}

/** Memory of a device that no step uses. A copy of the state waits there until it is copied to the host, while steps run. */
export interface StagingArea {
  readonly bytes: number;
  /** Copies pieces of buffers, as they are after all preceding calls, to the area; their `at` counts from byte `to` of it. */
  put(pieces: readonly CopyPiece[], to: number): void;
  /** Waits until the pieces are in the area. */
  filled(): Promise<void>;
  /** Copies bytes of the area to a block of `LocalRanks.hostMemory`, beside the steps that run. */
  copyOut(from: number, bytes: number, block: HostBlock): Promise<void>;
  /** Ends copies under way with an error, and frees the memory. */
  close(): void;
}

/** Memory and kernels of one rank. Calls execute in order; only `read` waits for them. */
export interface RankDevice {
  /** Sets gradients and metric accumulators to zero, at the start of a step; those that `first_kernel` writes may be left as they are. */
  zeroGradients(): void;
  /** Runs one op. `copy`: the activation copy. `first`: in the first microbatch of a step, where `first_kernel` may run. */
  compute(i: Compute, copy: number, first?: boolean): void;
  /** Writes the values of a buffer. */
  write(buffer: Buffer, copy: number, data: HostData): void;
  /** Writes initial weights to buffers that hold the same shard in different types, from one generation. */
  draw(buffers: readonly Buffer[], draw: NormalDraw): void;
  /** Opens a loader of weights. Absent: the host converts weights, and `write` serves. */
  openLoader?(): WeightLoader;
  /** Returns a copy of a buffer after all preceding calls. */
  read(buffer: Buffer, copy: number): Promise<HostData>;
  /** Copies buffers, as they are after all preceding calls, to a block of `LocalRanks.hostMemory`. Absent: `read` serves. */
  copyOut?(pieces: readonly CopyPiece[], block: HostBlock): Promise<void>;
  /** Opens a staging area of at most so many bytes, a multiple of `unit`, from what the steps leave free. Undefined: there is no room. */
  openStaging?(most: number, unit: number): StagingArea | undefined;
}

/** A rank device in host memory. */
export interface HostRankDevice extends RankDevice {
  /** Returns a view of a buffer, without a copy if it is f32 or i32. */
  peek(buffer: Buffer, copy: number): HostData;
}

/** The position of a rank: the block run (`F3`, `B0.1`, `step`), its microbatch (−1 in the step block), and its activation copy. */
export interface BlockPosition {
  readonly tag: string;
  readonly microbatch: number;
  readonly copy: number;
}

/**
 * Collectives on contiguous buffers; groups are the plan's, their members in ascending order of rank. With g members:
 * all_gather [n] → [g,n]; reduce_scatter [g,n] → [n], sums in the order of members; all_to_all [g,n] → [g,n], block i of
 * member j becomes block j of member i; all_reduce and all_reduce_max [n] → [n]; shift [n] → [n], from member i to
 * member (i + 1) mod g. Source and destination may begin at the same byte.
 */
export interface Comm {
  /**
   * Returns true when the collective is issued for this rank, false while members of its group are missing; the caller then retries. An
   * asynchronous one is always issued: it ends at the latest when `wait` returns true.
   */
  collective(rank: number, i: Collective, at: BlockPosition): boolean;
  /**
   * Waits for an asynchronous collective that this rank has begun, by its id; without an id, for all. Returns true when what is issued next
   * finds its results, false while members of its group are missing; the caller then retries.
   */
  wait(rank: number, id?: string): boolean;
  send(rank: number, i: Transfer, at: BlockPosition): void;
  /** Returns false while the message has not arrived; the caller then retries. */
  recv(rank: number, i: Transfer, at: BlockPosition): boolean;
}

/** What the ranks run together: a training step, one with the instructions of logged steps, or a batch of an evaluation. */
export type StepKind = "training" | "logged" | "evaluation";

/** The ranks of one process, on one kind of device. */
export interface LocalRanks {
  /** Whether reads may be issued once `finish` is called: they then follow the work of the step. */
  readonly readsInOrder?: boolean;
  readonly ranks: readonly number[];
  rankDevice(rank: number): RankDevice;
  readonly comm: Comm;
  /**
   * Begins a step of `microbatches`, or a batch of an evaluation. Returns true if it is replayed as a graph; then only writes of inputs have
   * an effect.
   */
  beginStep?(microbatches: number, kind?: StepKind): boolean;
  /**
   * Returns whether such a step may begin while the step before it runs: `finish` and reads of that step, which were called before, then return
   * its end and its numbers. At most two steps are under way. Absent: no.
   */
  canBeginAhead?(microbatches: number, kind: StepKind): boolean;
  /** Returns the bytes in use on the device of the first rank, by all programs. Absent: the device does not report it. */
  memoryInUse?(): number;
  /** Returns the instruction times of the last step, if opened with `profile`. */
  profile?(): Promise<readonly Timing[]> | readonly Timing[];
  /** Submits all issued work and waits for it. Throws errors of that work. */
  finish(): Promise<void>;
  /** With ranks in other processes: returns whether all ranks begin another step. */
  mayBegin?(): boolean;
  /** With ranks in other processes: requests that all ranks stop after the same step. */
  stop?(): void;
  /** With ranks in other processes: sums values of the stages' first ranks over all stages. */
  combine?(values: readonly number[]): Promise<number[]>;
  /**
   * With ranks in other processes: waits at the named barrier. Returns the first problem that a rank stated there. It may wait while
   * steps run.
   */
  meet?(name: string, problem?: string): Promise<string | undefined>;
  /** With ranks in other processes: reports what this process does or waits for, so that it does not count as hanging. */
  report?(what: string): void;
  /** Memory for copies of the state; absent: any memory serves. */
  readonly hostMemory?: HostMemory;
  /** Closes the ranks. `error`: the error that ended the run; other processes abort with it. */
  close(error?: Error): Promise<void>;
}
