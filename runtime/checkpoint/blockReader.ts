/**
 * Reads byte ranges of files into blocks of host memory and compares digests of what it read: in this thread, or in threads of its own, so
 * that several cores read and hash.
 */
import { workerData } from "node:worker_threads";
import { openInput } from "../data/inputFile.ts";
import { moduleUrl } from "../moduleUrl.ts";
import { serveTasks, TaskThread } from "../taskThread.ts";
import { type BlockAddress, bytesAt } from "./blockWriter.ts";
import { damaged, sha256 } from "./safetensors.ts";

/** A range to read, and the digests of parts of it. */
export interface ReadTask {
  readonly path: string;
  readonly from: number;
  readonly bytes: number;
  readonly memory: BlockAddress;
  /** `offset`: from the begin of the range. */
  readonly parts: readonly { readonly tensor: string; readonly offset: number; readonly bytes: number; readonly sha256: string }[];
}

/** The readers of a load. */
export interface BlockReaders {
  /** Fills the block. Rejects with a Trouble if the file cannot be read, is too short, or a digest differs. `reader`: its number. */
  read(reader: number, task: ReadTask): Promise<void>;
  close(): Promise<void>;
}

/** Opens readers: so many threads, or this thread for 0. */
export function openBlockReaders(threads: number): BlockReaders {
  if (threads === 0) return { read: async (_, task) => readBlock(task), close: async () => {} };
  const url = moduleUrl("checkpoint/blockReader", import.meta.url);
  const all = Array.from({ length: threads }, () => new TaskThread<ReadTask, void>(url, { blockReader: true }));
  return {
    async read(reader, task) {
      await all[reader % threads]?.perform(task);
    },
    async close() {
      await Promise.all(all.map((thread) => thread.close()));
    },
  };
}

function readBlock({ path, from, bytes, memory, parts }: ReadTask): void {
  const into = bytesAt(memory, bytes);
  const file = openInput(path, "the checkpoint", "paths start at the current folder");
  try {
    file.read(into, from);
  } finally {
    file.close();
  }
  for (const { tensor, offset, bytes: length, sha256: digest } of parts)
    if (sha256(into.subarray(offset, offset + length)) !== digest) throw damaged(path, tensor);
}

if ((workerData as { blockReader?: true } | null)?.blockReader) serveTasks(readBlock);
