/**
 * The files of a checkpoint: which rank writes which tensors, where each lies in its file, and the blocks in which the bytes are copied and
 * written.
 */
import { dtypes } from "../../schemas/dtypes.ts";
import type { Buffer, Plan } from "../../schemas/plan.ts";
import { elementsOf, rankAt } from "../../schemas/sharding.ts";
import type { CopyPiece } from "../backend.ts";
import { firstHolders } from "../shards.ts";
import type { TensorPiece } from "./blockWriter.ts";
import { checkpointState } from "./checkpointState.ts";
import { DIGEST_BYTES, digestKey, headerOf } from "./safetensors.ts";
import type { CheckpointText } from "./snapshotFile.ts";

/** The file name of a rank. */
export const fileOf = (rank: number): string => `rank-${String(rank).padStart(5, "0")}.safetensors`;

interface StateEntry {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly buffer: Buffer;
  readonly bytes: number;
}

/** The tensors of one rank's file, in the order of the file. */
export interface StateFile {
  readonly rank: number;
  readonly entries: readonly StateEntry[];
  readonly bytes: number;
}

/** Returns the sharding of each tensor of the checkpoint state, and the files of the ranks that are first holders of a shard. */
export function stateFiles({ mesh, programs }: Plan): {
  readonly tensors: CheckpointText["tensors"];
  readonly files: ReadonlyMap<number, StateFile>;
} {
  const tensors: CheckpointText["tensors"] = {};
  const entries = new Map<number, StateEntry[]>();
  for (const program of programs)
    for (const { name, buffer } of checkpointState(program)) {
      if (name in tensors) throw new Error(`${name} is in the checkpoint state twice`);
      tensors[name] = { stage: program.stage, sizes: buffer.sizes, shardedBy: buffer.shardedBy };
      const { safetensors: dtype, bytes: size } = dtypes[buffer.dtype];
      for (const n of firstHolders(mesh, buffer)) {
        const rank = rankAt(mesh, program.stage, n);
        const own = entries.get(rank) ?? [];
        entries.set(rank, own);
        own.push({ name, dtype, shape: buffer.shape, buffer, bytes: elementsOf(buffer.shape) * size });
      }
    }
  const files = [...entries].map(([rank, own]): [number, StateFile] => {
    // wide elements first: every tensor then begins at a multiple of its element
    const sorted = own.sort((a, b) => dtypes[b.buffer.dtype].bytes - dtypes[a.buffer.dtype].bytes);
    return [rank, { rank, entries: sorted, bytes: sorted.reduce((sum, { bytes }) => sum + bytes, 0) }];
  });
  return { tensors, files: new Map(files) };
}

/** Digests of the parts of a tensor by number. */
export type PartDigests = ReadonlyMap<string, readonly string[]>;

/**
 * Returns the header of a file; each `digestBytes` of a tensor have a digest. A part without one has zeros in its place: the header has one
 * length, whatever the digests.
 */
export function headerFor({ entries }: StateFile, step: number, digestBytes: number, digests: PartDigests = new Map()): Uint8Array {
  const known = entries.map(({ name, bytes }) => {
    const own = digests.get(name);
    const parts = Array.from({ length: Math.max(1, Math.ceil(bytes / digestBytes)) }, (_, n) => own?.[n] ?? "0".repeat(64));
    return [digestKey(name), parts.join("")];
  });
  return headerOf(entries, { step: String(step), [DIGEST_BYTES]: String(digestBytes), ...Object.fromEntries(known) });
}

/** Consecutive bytes of a file. */
export interface StateBlock {
  /** The writer that gets it: all pieces of a tensor go to one. */
  readonly writer: number;
  /** The position behind the header, in bytes. */
  readonly at: number;
  readonly pieces: readonly (TensorPiece & CopyPiece)[];
}

/** Splits a file into blocks of at most `size` bytes for `writers`, in an order that gives all writers work. */
export function blocksOf(file: StateFile, size: number, writers: number): StateBlock[] {
  const share = file.bytes / writers;
  const segments = Array.from({ length: writers }, (): StateBlock[] => []);
  let start = 0;
  let pieces: (TensorPiece & CopyPiece)[] = [];
  let used = 0;
  let writer = 0;
  const flush = (): void => {
    if (used > 0) segments[writer]?.push({ writer, at: start, pieces });
    start += used;
    pieces = [];
    used = 0;
  };
  let before = 0;
  for (const { name, buffer, bytes } of file.entries) {
    const owner = Math.min(writers - 1, Math.floor(before / share));
    if (owner !== writer) flush();
    writer = owner;
    before += bytes;
    for (let from = 0; from < bytes; ) {
      const length = Math.min(size - used, bytes - from);
      pieces.push({ tensor: name, dtype: buffer.dtype, buffer, from, bytes: length, at: used, last: from + length === bytes });
      used += length;
      from += length;
      if (used === size) flush();
    }
  }
  flush();
  const rounds = Math.max(...segments.map(({ length }) => length));
  return Array.from({ length: rounds }, (_, i) => segments.flatMap((blocks) => blocks.slice(i, i + 1))).flat();
}
