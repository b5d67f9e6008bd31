/**
 * Writes blocks of host memory to the files of a checkpoint: in this thread, or in threads of its own while training continues. A block
 * holds consecutive bytes of a file, pieces of tensors. The SHA-256 of a tensor and the check for values that are not finite are made from
 * the memory that is written, so no file is read again.
 */
import { createHash, type Hash } from "node:crypto";
import { closeSync, fdatasyncSync, fsyncSync, openSync, writeSync } from "node:fs";
import { workerData } from "node:worker_threads";
import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import { koffi } from "../cuda/libraries.ts";
import { moduleUrl } from "../moduleUrl.ts";
import { serveTasks, TaskThread } from "../taskThread.ts";

/** Memory of a block as a thread finds it: shared memory, or the address of pinned memory. */
export type BlockAddress = SharedArrayBuffer | bigint;

/** Bytes of one tensor in a block. */
export interface TensorPiece {
  readonly tensor: string;
  readonly dtype: Dtype;
  /** The first byte of the tensor in the piece. */
  readonly from: number;
  readonly bytes: number;
  /** The tensor ends with this piece. */
  readonly last: boolean;
}

/** A task of a writer. */
export type WriteTask =
  | {
      readonly kind: "block";
      readonly path: string;
      /** The position in the file, in bytes. */
      readonly at: number;
      readonly memory: BlockAddress;
      readonly pieces: readonly TensorPiece[];
      /** Bytes of a tensor that have a digest of their own. */
      readonly digestBytes: number;
    }
  /** Writes the header with the digests, and flushes the file to the disk. */
  | { readonly kind: "finish"; readonly path: string; readonly header: Uint8Array }
  /** Forgets tensors that were begun: the checkpoint is given up. */
  | { readonly kind: "forget" };

/** What a writer found in a block. */
export interface BlockResult {
  /** The SHA-256 of each part of a tensor that ended in the block; `part`: its number in the tensor. */
  readonly digests: readonly (readonly [tensor: string, part: number, sha256: string])[];
  /** Tensors with values that are NaN or infinite, and their number in the block. */
  readonly nonfinite: readonly (readonly [tensor: string, count: number])[];
}

/** Performs tasks in the order in which it receives them. All pieces of a tensor go to one writer. */
interface BlockWriter {
  perform(task: WriteTask): Promise<BlockResult>;
}

/** The writers of a process. */
export interface BlockWriters {
  readonly writers: readonly BlockWriter[];
  close(): Promise<void>;
}

/** Opens writers: so many threads, or one writer in this thread for 0. */
export function openBlockWriters(threads: number): BlockWriters {
  if (threads === 0) {
    const writer = new TaskWriter();
    return { writers: [{ perform: async (task) => writer.perform(task) }], close: async () => {} };
  }
  const url = moduleUrl("checkpoint/blockWriter", import.meta.url);
  const all = Array.from({ length: threads }, () => new TaskThread<WriteTask, BlockResult>(url, { blockWriter: true }));
  return {
    writers: all,
    async close() {
      await Promise.all(all.map((thread) => thread.close()));
    },
  };
}

/** The number of bytes of a block that is in use. */
const bytesOfPieces = (pieces: readonly TensorPiece[]): number => pieces.reduce((sum, { bytes }) => sum + bytes, 0);

/** Smaller blocks are flushed with their file. */
const SYNC_BYTES = 2 ** 22;

const nothing: BlockResult = { digests: [], nonfinite: [] };

class TaskWriter {
  readonly #hashes = new Map<string, Hash>();

  /** Performs one task. Throws the error of the file system. */
  perform(task: WriteTask): BlockResult {
    switch (task.kind) {
      case "block":
        return this.#block(task);
      case "finish":
        withFile(task.path, (fd) => {
          writeAll(fd, task.header, 0);
          fsyncSync(fd);
        });
        return nothing;
      case "forget":
        this.#hashes.clear();
        return nothing;
      default:
        return task satisfies never;
    }
  }

  #block({ path, at, memory, pieces, digestBytes }: Extract<WriteTask, { kind: "block" }>): BlockResult {
    const bytes = bytesAt(memory, bytesOfPieces(pieces));
    withFile(path, (fd) => {
      writeAll(fd, bytes, at);
      // otherwise the system collects gigabytes before the disk begins, and `finish` waits for them
      if (bytes.length >= SYNC_BYTES) fdatasyncSync(fd);
    });
    const digests: [string, number, string][] = [];
    const nonfinite: [string, number][] = [];
    let start = 0;
    for (const { tensor, dtype, from, bytes: length, last } of pieces) {
      const own = bytes.subarray(start, start + length);
      start += length;
      const wrong = nonfiniteIn(own, dtype);
      if (wrong > 0) nonfinite.push([tensor, wrong]);
      const key = `${path} ${tensor}`;
      for (let done = 0; done < length; ) {
        const part = Math.floor((from + done) / digestBytes);
        const end = Math.min(length, (part + 1) * digestBytes - from);
        const hash = this.#hashes.get(key) ?? createHash("sha256");
        hash.update(own.subarray(done, end));
        done = end;
        const isWhole = from + end === (part + 1) * digestBytes || (last && end === length);
        if (isWhole) {
          digests.push([tensor, part, hash.digest("hex")]);
          this.#hashes.delete(key);
        } else this.#hashes.set(key, hash);
      }
    }
    return { digests, nonfinite };
  }
}

/** Returns the bytes of a block of host memory. */
export const bytesAt = (memory: BlockAddress, bytes: number): Uint8Array =>
  typeof memory === "bigint" ? new Uint8Array(koffi().view(memory, bytes)) : new Uint8Array(memory, 0, bytes);

function withFile(path: string, act: (fd: number) => void): void {
  const fd = openSync(path, "r+");
  try {
    act(fd);
  } finally {
    closeSync(fd);
  }
}

function writeAll(fd: number, bytes: Uint8Array, at: number): void {
  for (let done = 0; done < bytes.length; ) done += writeSync(fd, bytes, done, bytes.length - done, at + done);
}

/** The exponent bits of a float; a value whose exponent bits are all ones is NaN or infinite. */
const exponents: Readonly<Record<Dtype, number | null>> = { f32: 0x7f800000, bf16: 0x7f80, f16: 0x7c00, f8e4m3: null, i32: null };

/** Counts the values that are NaN or infinite. */
function nonfiniteIn(bytes: Uint8Array, dtype: Dtype): number {
  const mask = exponents[dtype];
  if (mask === null) return 0;
  const size = dtypes[dtype].bytes;
  const { buffer, byteOffset, byteLength } = bytes.byteOffset % size === 0 ? bytes : bytes.slice();
  const words = size === 4 ? new Uint32Array(buffer, byteOffset, byteLength / 4) : new Uint16Array(buffer, byteOffset, byteLength / 2);
  let count = 0;
  for (let i = 0; i < words.length; i++) if ((words[i]! & mask) === mask) count++;
  return count;
}

if ((workerData as { blockWriter?: true } | null)?.blockWriter) {
  const writer = new TaskWriter();
  serveTasks((task: WriteTask) => writer.perform(task));
}
