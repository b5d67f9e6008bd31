/**
 * Loads the checkpoint state through the blocks of a device. A rank reads the parts of saved tensors that its shards need, several at a
 * time, straight into page-locked memory; each part has a digest, which the thread that reads it compares.
 */
import { availableParallelism } from "node:os";
import { dtypes } from "../../schemas/dtypes.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { WeightLoader, WeightTarget } from "../backend.ts";
import { openBlockReaders, type ReadTask } from "./blockReader.ts";
import { allBlocks, isConvertible, LoadProgress } from "./loadWeights.ts";
import type { PartDigest } from "./safetensors.ts";
import { cutPiece, type StatePiece } from "./statePieces.ts";

/** A saved shard, and the pieces of it that a shard of this run needs. */
export interface SavedShard {
  readonly path: string;
  readonly tensor: string;
  /** The element type, as safetensors names it, and its bytes. */
  readonly dtype: string;
  readonly elementBytes: number;
  /** The first byte in the file. */
  readonly start: number;
  /** The digests of consecutive parts of the shard. */
  readonly parts: readonly PartDigest[];
  readonly pieces: readonly StatePiece[];
}

/** A shard of this run, and the buffers that receive it. */
export interface RestoredShard {
  readonly saved: readonly SavedShard[];
  readonly target: WeightTarget;
}

/** Returns whether a loader writes this shard: the types are convertible, and a part fits into a block. */
export function isLoadable({ saved, target }: RestoredShard, blockBytes: number): boolean {
  const sizes = target.map(({ dtype }) => dtypes[dtype].bytes);
  return (
    new Set(sizes).size === sizes.length &&
    target.every(({ dtype }) => isConvertible(dtypes[dtype].safetensors)) &&
    saved.every(({ dtype, parts }) => isConvertible(dtype) && parts.length > 0 && parts.every(({ from, to }) => to - from <= blockBytes))
  );
}

/** Elements of a piece in a block. */
interface Placed {
  readonly shard: SavedShard;
  readonly piece: StatePiece;
  readonly offset: number;
  readonly target: WeightTarget;
}
type Read = Omit<ReadTask, "memory"> & { readonly placed: readonly Placed[] };

/** A state below this size is read faster than threads start. */
const SMALL = 2 ** 23;

/** Loads shards. Throws a Trouble if a file cannot be read, is damaged, or has a value that is not finite. */
export async function loadState(loader: WeightLoader, shards: readonly RestoredShard[], print?: (line: string) => void): Promise<void> {
  const reads = readsOf(shards, loader.blockBytes);
  const total = reads.reduce((sum, { bytes }) => sum + bytes, 0);
  const progress = new LoadProgress("reading the checkpoint", total, print);
  const readers = openBlockReaders(total < SMALL ? 0 : Math.max(1, Math.min(loader.blocks, availableParallelism() - 1)));
  const names: string[] = [];
  let next = 0;
  const work = async (block: number): Promise<void> => {
    for (let read = reads[next++]; read; read = reads[next++]) {
      const { path, from, bytes, parts, placed } = read;
      const { address } = await loader.free(block);
      await readers.read(block, { path, from, bytes, parts, memory: address });
      loader.place(
        block,
        bytes,
        placed.map(({ shard, piece, offset, target }) => ({
          ...{ offset, target, piece: { ...piece, tensor: shard } },
          id: names.push(`${shard.path}: ${shard.tensor}`) - 1,
        })),
      );
      progress.add(bytes);
    }
  };
  try {
    await allBlocks(loader.blocks, work, () => {
      next = reads.length;
    });
    const bad = await loader.finish();
    if (bad !== undefined) throw new Trouble(`${names[bad]} has a value that is not finite`, "use a checkpoint of an earlier step");
  } finally {
    await readers.close();
    loader.close();
  }
}

/** Returns reads of at most `most` bytes: whole parts that follow one another in a file. */
function readsOf(shards: readonly RestoredShard[], most: number): Read[] {
  const tensors = new Map<string, { shard: SavedShard; wanted: { piece: StatePiece; target: WeightTarget }[] }>();
  for (const { saved, target } of shards)
    for (const shard of saved) {
      const key = `${shard.path} ${shard.tensor}`;
      const known = tensors.get(key) ?? { shard, wanted: [] };
      tensors.set(key, known);
      known.wanted.push(...shard.pieces.map((piece) => ({ piece, target })));
    }
  const parts = [...tensors.values()].flatMap(({ shard, wanted }) =>
    shard.parts.flatMap(({ from, to, sha256 }) => {
      const [first, last] = [from, to].map((byte) => byte / shard.elementBytes);
      const placed = wanted.flatMap(({ piece, target }) =>
        cutPiece(piece, first ?? 0, last ?? 0).map((cut) => ({ shard, target, piece: cut, offset: cut.at * shard.elementBytes - from })),
      );
      const digest = { tensor: shard.tensor, offset: 0, bytes: to - from, sha256 };
      return placed.length === 0 ? [] : [{ path: shard.path, from: shard.start + from, bytes: to - from, parts: [digest], placed }];
    }),
  );
  parts.sort((a, b) => (a.path === b.path ? a.from - b.from : a.path < b.path ? -1 : 1));
  const reads: (Read & { bytes: number; parts: Read["parts"][number][]; placed: Placed[] })[] = [];
  for (const part of parts) {
    const last = reads.at(-1);
    if (last?.path === part.path && last.from + last.bytes === part.from && last.bytes + part.bytes <= most) {
      last.parts.push(...part.parts.map((own) => ({ ...own, offset: last.bytes })));
      last.placed.push(...part.placed.map((own) => ({ ...own, offset: last.bytes + own.offset })));
      last.bytes += part.bytes;
    } else reads.push(part);
  }
  return reads;
}
