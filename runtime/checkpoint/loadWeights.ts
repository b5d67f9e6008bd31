/**
 * Loads weights of a checkpoint through the blocks of a device: several reads of files are under way while the device copies, converts and
 * transposes what was read. A rank reads the bytes of its shards; 16-bit weights are not widened on the host.
 */
import { type FileHandle, open } from "node:fs/promises";
import { Trouble } from "../../schemas/trouble.ts";
import type { WeightLoader, WeightTarget } from "../backend.ts";
import { type FilePiece, type ReadRange, readsFor } from "./pieces.ts";
import { transferText } from "./transferText.ts";

/** A shard that is loaded: its pieces, and the buffers that receive it. */
export interface LoadedShard {
  readonly pieces: readonly FilePiece[];
  readonly target: WeightTarget;
}

/** The element types that devices convert, with their bytes. */
const convertible: Readonly<Record<string, number>> = { F32: 4, BF16: 2, F16: 2 };
/** Returns whether devices convert elements of this type. */
export const isConvertible = (dtype: string): boolean => dtype in convertible;

/** Loads shards. Throws a Trouble if a file ends early, cannot be read, or has a value that is not finite. */
export async function loadShards(loader: WeightLoader, shards: readonly LoadedShard[], onProgress?: (line: string) => void): Promise<void> {
  const pieces = shards.flatMap(({ pieces, target }) => pieces.map((piece) => ({ piece, of: target })));
  const reads = readsFor(pieces, ({ tensor }) => convertible[tensor.dtype] ?? 0, loader.blockBytes);
  const progress = new LoadProgress(
    "reading weights",
    reads.reduce((sum, { bytes }) => sum + bytes, 0),
    onProgress,
  );
  const files = new Map<string, Promise<FileHandle>>();
  const fileAt = (path: string): Promise<FileHandle> => {
    const file = files.get(path) ?? open(path, "r");
    files.set(path, file);
    return file;
  };
  const placed: FilePiece[] = [];
  let next = 0;
  const work = async (block: number): Promise<void> => {
    for (let read = reads[next++]; read; read = reads[next++]) {
      const { bytes: memory } = await loader.free(block);
      await fill(memory.subarray(0, read.bytes), read, await fileAt(read.path));
      loader.place(
        block,
        read.bytes,
        read.pieces.map(({ piece, offset, of }) => ({ piece, offset, target: of, id: placed.push(piece) - 1 })),
      );
      progress.add(read.bytes);
    }
  };
  try {
    await allBlocks(loader.blocks, work, () => {
      next = reads.length;
    });
    const bad = await loader.finish();
    const tensor = bad === undefined ? undefined : placed[bad]?.tensor;
    if (tensor)
      throw new Trouble(`${tensor.path}: ${tensor.name} has a value that is not finite`, "name a checkpoint whose weights are finite");
  } finally {
    for (const file of files.values()) await (await file.catch(() => undefined))?.close();
    loader.close();
  }
}

/** Works with all blocks at the same time. After an error it calls `stop` and throws when no block is in use any more. */
export async function allBlocks(blocks: number, work: (block: number) => Promise<void>, stop: () => void): Promise<void> {
  let first: unknown;
  const attempt = async (block: number): Promise<void> => {
    try {
      await work(block);
    } catch (error) {
      first ??= error;
      stop();
    }
  };
  await Promise.all(Array.from({ length: blocks }, (_, block) => attempt(block)));
  if (first !== undefined) throw first;
}

async function fill<T>(memory: Uint8Array, { path, from }: ReadRange<T>, file: FileHandle): Promise<void> {
  for (let done = 0; done < memory.length; ) {
    const { bytesRead } = await file.read(memory, done, memory.length - done, from + done).catch((error: NodeJS.ErrnoException) => {
      throw new Trouble(`${path} cannot be read (${error.code})`, "see whether the disk or the network file system is well");
    });
    if (bytesRead === 0) throw new Trouble(`${path} became shorter while it was read`, "let nothing write to it, and run again");
    done += bytesRead;
  }
}

/** Reports bytes, rate and the time left. */
export class LoadProgress {
  readonly #what: string;
  readonly #total: number;
  readonly #print: ((line: string) => void) | undefined;
  readonly #begun = performance.now();
  #done = 0;

  constructor(what: string, total: number, print: ((line: string) => void) | undefined) {
    this.#what = what;
    this.#total = total;
    this.#print = print;
  }

  add(bytes: number): void {
    this.#done += bytes;
    this.#print?.(transferText(this.#what, this.#done, this.#total, (performance.now() - this.#begun) / 1000));
  }
}
