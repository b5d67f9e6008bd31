/** Reads tensors of a checkpoint: any shard of one, from the files of the ranks that saved it. */
import { rankAt } from "../../schemas/sharding.ts";
import { copyShared, firstHolders, lengthsOf, type Ranges, rowsWithin, type SharedRun, shardRanges, sharedBy } from "../shards.ts";
import { expectFinite } from "./finite.ts";
import type { SavedShard } from "./loadState.ts";
import { ReusedMemory } from "./reusedMemory.ts";
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
  /** The bytes that the results of `slices` use one after another. */
  reusedBytes(): number;
  /** Whether `slices` reads rows without the rest of the tensor. */
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
  const memories: ReusedMemory[] = [];
  const assembled = new ReusedMemory();
  function shard(name: string, ranges: Ranges, held?: Map<number, Float32Array>): Float32Array {
    const holders = holdersOf(name);
    const [holder] = holders;
    // a tensor that is in one file needs no copy
    if (holders.length === 1 && holder && `${holder.theirs}` === `${ranges}`)
      return (
        held?.get(holder.rank) ??
        extentFrom(fileAt(holder.rank), name, wholeOf(holder.theirs), held && (memories[0] ??= new ReusedMemory()))
      );
    const elements = lengthsOf(ranges).reduce((n, length) => n * length, 1);
    let out: Float32Array | undefined;
    for (const [n, { theirs, rank }] of holders.entries()) {
      const shared = sharedBy(theirs, ranges);
      if (!shared) continue;
      const file = fileAt(rank);
      const isPart = held !== undefined && hasParts(file, name);
      const extent = isPart ? extentOf(theirs, shared) : wholeOf(theirs);
      const values = held?.get(rank) ?? extentFrom(file, name, extent, isPart ? (memories[n] ??= new ReusedMemory()) : undefined);
      if (`${extent.own}` === `${ranges}`) return values;
      if (!isPart) held?.set(rank, values);
      out ??= held ? assembled.floats(elements) : new Float32Array(elements);
      copyShared(sharedBy(extent.own, ranges) ?? [], [extent.own, values], [ranges, out]);
    }
    return out ?? new Float32Array(elements);
  }
  return {
    shard: (name, ranges) => shard(name, ranges),
    slices(name) {
      const held = new Map<number, Float32Array>();
      return (ranges) => shard(name, ranges, held);
    },
    reusedBytes: () => [assembled, ...memories].reduce((sum, memory) => sum + (memory?.buffer.byteLength ?? 0), 0),
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

/** Consecutive elements of a saved shard, and what they are of the tensor. */
interface Extent {
  readonly own: Ranges;
  readonly from: number;
  readonly to: number;
}

const wholeOf = (theirs: Ranges): Extent => ({ own: theirs, from: 0, to: lengthsOf(theirs).reduce((n, length) => n * length, 1) });

/** Returns the rows of a saved shard from the first to the last that another shard shares with it: of its first dim, or within one index of it. */
function extentOf(theirs: Ranges, shared: readonly (readonly SharedRun[])[]): Extent {
  const own: Ranges[number][] = [];
  let { from, to } = wholeOf(theirs);
  for (const [dim, runs] of shared.entries()) {
    const [first, last] = [runs.at(0)?.from ?? 0, runs.at(-1)];
    const end = last ? last.from + last.length : first;
    const [ranges = []] = rowsWithin([theirs[dim] ?? []], first, end);
    const width = lengthsOf(theirs.slice(dim + 1)).reduce((n, length) => n * length, 1);
    [from, to] = [from + first * width, from + end * width];
    own.push(ranges);
    if (end - first !== 1) break;
  }
  return { own: [...own, ...theirs.slice(own.length)], from, to };
}

/** Reads consecutive elements of a saved shard. */
function extentFrom(file: Safetensors, name: string, { from, to }: Extent, reused?: ReusedMemory): Float32Array {
  return expectFinite(file.readElements(name, from, to, reused), `${file.path}: ${name}`, "use a checkpoint of an earlier step");
}
