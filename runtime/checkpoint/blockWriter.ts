/**
 * Writes blocks of host memory to the files of a checkpoint: in this thread, or in threads of its own while training continues. A block
 * holds consecutive bytes of a file, pieces of tensors. The SHA-256 of a tensor and the check for values that are not finite are made from
 * the memory that is written, so no file is read again.
 */
import { createHash, type Hash } from "node:crypto";
import { closeSync, fsyncSync, openSync, writeSync } from "node:fs";
import { parentPort, type Worker, workerData } from "node:worker_threads";
import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import { koffi } from "../cuda/libraries.ts";
import { moduleUrl } from "../moduleUrl.ts";
import { startThread } from "../thread.ts";

/** Memory of a block as a thread finds it: shared memory, or the address of pinned memory. */
export type BlockAddress = SharedArrayBuffer | bigint;

/** Bytes of one tensor in a block. */
export interface TensorPiece {
  readonly tensor: string;
  readonly dtype: Dtype;
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
    }
  /** Writes the header with the digests, and flushes the file to the disk. */
  | { readonly kind: "finish"; readonly path: string; readonly header: Uint8Array }
  /** Forgets tensors that were begun: the checkpoint is given up. */
  | { readonly kind: "forget" };

/** What a writer found in a block. */
export interface BlockResult {
  /** The SHA-256 of each tensor that ended in the block. */
  readonly digests: readonly (readonly [tensor: string, sha256: string])[];
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
  const all = Array.from({ length: threads }, () => new WriterThread());
  return {
    writers: all,
    async close() {
      await Promise.all(all.map((thread) => thread.close()));
    },
  };
}

/** The number of bytes of a block that is in use. */
const bytesOfPieces = (pieces: readonly TensorPiece[]): number => pieces.reduce((sum, { bytes }) => sum + bytes, 0);

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

  #block({ path, at, memory, pieces }: Extract<WriteTask, { kind: "block" }>): BlockResult {
    const bytes = bytesAt(memory, bytesOfPieces(pieces));
    withFile(path, (fd) => writeAll(fd, bytes, at));
    const digests: [string, string][] = [];
    const nonfinite: [string, number][] = [];
    let start = 0;
    for (const { tensor, dtype, bytes: length, last } of pieces) {
      const own = bytes.subarray(start, start + length);
      start += length;
      const key = `${path} ${tensor}`;
      const hash = this.#hashes.get(key) ?? createHash("sha256");
      this.#hashes.set(key, hash.update(own));
      const wrong = nonfiniteIn(own, dtype);
      if (wrong > 0) nonfinite.push([tensor, wrong]);
      if (!last) continue;
      digests.push([tensor, hash.digest("hex")]);
      this.#hashes.delete(key);
    }
    return { digests, nonfinite };
  }
}

const bytesAt = (memory: BlockAddress, bytes: number): Uint8Array =>
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

interface Message {
  readonly result?: BlockResult;
  readonly error?: { readonly code: string | undefined; readonly message: string };
}

/** A writer in a thread of its own, which answers tasks in their order. */
class WriterThread implements BlockWriter {
  readonly #worker: Worker;
  readonly #waiting: { readonly resolve: (result: BlockResult) => void; readonly reject: (error: Error) => void }[] = [];

  constructor() {
    this.#worker = startThread(moduleUrl("checkpoint/blockWriter", import.meta.url), { workerData: { blockWriter: true } });
    this.#worker.on("message", ({ result, error }: Message) => {
      const next = this.#waiting.shift();
      if (this.#waiting.length === 0) this.#worker.unref();
      if (error) next?.reject(Object.assign(new Error(error.message), error.code !== undefined && { code: error.code }));
      else next?.resolve(result ?? nothing);
    });
    this.#worker.on("error", (error: Error) => {
      for (const { reject } of this.#waiting.splice(0)) reject(error);
    });
    this.#worker.unref();
  }

  perform(task: WriteTask): Promise<BlockResult> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      // a pending write keeps the process alive
      this.#worker.ref();
      this.#worker.postMessage(task);
    });
  }

  async close(): Promise<void> {
    await this.#worker.terminate();
  }
}

function serve(): void {
  const writer = new TaskWriter();
  parentPort?.on("message", (task: WriteTask) => {
    let message: Message;
    try {
      message = { result: writer.perform(task) };
    } catch (error) {
      const { code, message: text } = error as NodeJS.ErrnoException;
      message = { error: { code, message: text } };
    }
    parentPort?.postMessage(message);
  });
}

if ((workerData as { blockWriter?: true } | null)?.blockWriter) serve();
