/** Look-ups that must succeed: a missing entry is an error of the program, and its message names the entry. */
import type { Kernel } from "./plan.ts";

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
/** Returns the source file of a kernel. Throws for plans of the CPU, whose kernels have none. */
export function sourceOf({ id, source }: Pick<Kernel, "id" | "source">): { readonly file: string; readonly sha256: string } {
  if (!source) throw new Error(`rankc: the kernel ${id} has no source: the plan is for another target`);
  return source;
}
