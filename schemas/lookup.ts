/** Look-ups that must succeed: a missing entry is an error of the program, and its message names the entry. */
import type { Kernel, Memory, Plan, Program } from "./plan.ts";
import { stageOfRank } from "./sharding.ts";

/** Returns an entry of a map. Throws if there is none; `what` names the kind of entry. */
export function entryOf<K, V>(map: ReadonlyMap<K, V>, key: K, what: string): V {
  const value = map.get(key);
  if (value === undefined) throw new Error(`rankc: there is no ${what} ${String(key)}`);
  return value;
}
/** Returns an item of a list. Throws if the list is shorter; `what` names the kind of item. */
export function itemOf<V>(list: readonly V[], index: number, what: string): V {
  const value = list[index];
  if (value === undefined) throw new Error(`rankc: there is no ${what} ${index}`);
  return value;
}
/** Returns the program of a rank. */
export const programOfRank = ({ mesh, programs }: Pick<Plan, "mesh" | "programs">, rank: number): Program =>
  itemOf(programs, stageOfRank(mesh, rank), "program of stage");
/** Returns the offset in bytes of a buffer in its arena. */
export function offsetOf({ offsets }: Pick<Memory, "offsets">, id: string): number {
  const offset = offsets[id];
  if (offset === undefined) throw new Error(`rankc: the buffer ${id} has no offset`);
  return offset;
}
/** Returns the source file of a kernel. Throws for plans of the CPU, whose kernels have none. */
export function sourceOf({ id, source }: Pick<Kernel, "id" | "source">): { readonly file: string; readonly sha256: string } {
  if (!source) throw new Error(`rankc: the kernel ${id} has no source`);
  return source;
}
