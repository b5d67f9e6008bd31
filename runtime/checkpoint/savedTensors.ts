/** Reads tensors of a checkpoint: any shard of one, from the files of the ranks that saved it. */
import { rankAt } from "../../schemas/sharding.ts";
import { copyShared, firstHolders, lengthsOf, type Ranges, rowsWithin, type SharedRun, shardRanges, sharedBy } from "../shards.ts";
import { expectFinite } from "./finite.ts";
import type { SavedShard } from "./loadState.ts";
import type { Safetensors } from "./safetensors.ts";
import type { CheckpointText } from "./snapshotFile.ts";
import { sharedPieces } from "./statePieces.ts";

interface SavedTensorsSettings extends Pick<CheckpointText, "mesh" | "tensors"> {
  /** The folder of the checkpoint, for messages. */
  readonly at: string;
  /** Returns the file of a rank. */
  readonly fileAt: (rank: number) => Safetensors;
}

/** The tensors of a checkpoint by name. */
export interface SavedTensors {
  /** Assembles ranges of a tensor. Throws a Trouble if a file is damaged or has values that are not finite. */
  shard(name: string, ranges: Ranges): Float32Array;
  /**
   * Returns a function that assembles ranges of a tensor as `shard` does, and keeps the shards of files that it has to read whole: for
   * slices one after another. A result is valid until the next call of any of these functions, which may use its memory.
   */
  slices(name: string): (ranges: Ranges) => Float32Array;
  /** Whether `slices` reads rows of the first dim without the rest of the tensor. */
  readsRows(name: string): boolean;
  /** Returns the saved shards that have elements of these ranges of a tensor, with those elements. */
  savedShards(name: string, ranges: Ranges): SavedShard[];
}

/** Returns the tensors of a checkpoint. */
export function savedTensors({ at, mesh, tensors, fileAt }: SavedTensorsSettings): SavedTensors {
  function tensor(name: string) {
    const found = tensors[name];
    if (!found) throw new Error(`${at} holds no ${name}`);
    return found;
  }
  function holdersOf(name: string) {
    const saved = tensor(name);
    return firstHolders(mesh, saved).map((n) => ({ theirs: shardRanges(mesh, saved, n), rank: rankAt(mesh, saved.stage, n) }));
  }
  let memory = new ArrayBuffer(0);
  // arrays of each tensor would fill the memory until they are collected
  const memoryFor = (bytes: number): ArrayBuffer => {
    if (memory.byteLength < bytes) memory = new ArrayBuffer(Math.ceil(bytes / 8) * 8);
    return memory;
  };
  function shard(name: string, ranges: Ranges, held?: Map<number, Float32Array>): Float32Array {
    const holders = holdersOf(name);
    const [holder] = holders;
    // a tensor that is in one file needs no copy
    if (holders.length === 1 && holder && `${holder.theirs}` === `${ranges}`)
      return held?.get(holder.rank) ?? rowsFrom(fileAt(holder.rank), name, holder.theirs, undefined, held && memoryFor);
    const out = new Float32Array(lengthsOf(ranges).reduce((n, length) => n * length, 1));
    for (const { theirs, rank } of holders) {
      const shared = sharedBy(theirs, ranges);
      if (!shared) continue;
      const file = fileAt(rank);
      const rows = held && hasParts(file, name) ? rowsOf(shared) : undefined;
      const own = rows ? rowsWithin(theirs, ...rows) : theirs;
      const values = held?.get(rank) ?? rowsFrom(file, name, theirs, rows, rows && memoryFor);
      if (`${own}` === `${ranges}`) return values;
      if (!rows) held?.set(rank, values);
      copyShared(sharedBy(own, ranges) ?? [], [own, values], [ranges, out]);
    }
    return out;
  }
  return {
    shard: (name, ranges) => shard(name, ranges),
    slices(name) {
      const held = new Map<number, Float32Array>();
      return (ranges) => shard(name, ranges, held);
    },
    readsRows: (name) => holdersOf(name).every(({ rank }) => hasParts(fileAt(rank), name)),
    savedShards(name, ranges) {
      return holdersOf(name).flatMap(({ theirs, rank }) => {
        const shared = sharedBy(theirs, ranges);
        if (!shared) return [];
        const file = fileAt(rank);
        const { dtype, decoder, start } = file.info(name);
        const pieces = sharedPieces(shared, lengthsOf(theirs), lengthsOf(ranges));
        return [{ path: file.path, tensor: name, dtype, elementBytes: decoder.bytes, start, parts: file.digestsOf(name), pieces }];
      });
    },
  };
}

/** Whether a file has digests of parts of a tensor, so that rows of it can be read and checked alone. */
function hasParts(file: Safetensors, name: string): boolean {
  const [part, ...others] = file.digestsOf(name);
  return part !== undefined && others.length > 0 && part.to % file.info(name).decoder.bytes === 0;
}

/** The rows of a saved shard, from the first to the last that another shard shares with it; undefined: it is a number. */
function rowsOf([runs]: readonly (readonly SharedRun[])[]): readonly [from: number, to: number] | undefined {
  const [first, last] = [runs?.at(0), runs?.at(-1)];
  return first && last && [first.from, last.from + last.length];
}

/** Reads rows of a saved shard; undefined: all. */
function rowsFrom(
  file: Safetensors,
  name: string,
  theirs: Ranges,
  rows?: readonly [from: number, to: number],
  memoryFor?: (bytes: number) => ArrayBuffer,
): Float32Array {
  const all = lengthsOf(theirs).reduce((n, length) => n * length, 1);
  const width = lengthsOf(theirs.slice(1)).reduce((n, length) => n * length, 1);
  const [from, to] = rows ? [rows[0] * width, rows[1] * width] : [0, all];
  return expectFinite(file.readElements(name, from, to, memoryFor), `${file.path}: ${name}`, "use a checkpoint of an earlier step");
}
