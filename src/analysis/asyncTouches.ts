/** Asynchronous collectives touch their buffers until an instruction waits for them. */
import { visitTouched } from "../../schemas/effects.ts";
import type { Collective, Instruction } from "../../schemas/plan.ts";
import type { BufferTable } from "./bufferTable.ts";

/** The asynchronous collectives that have begun and not ended, by id, in the order of their begin. */
export type OpenCollectives = Map<string, Collective>;

/**
 * Calls `visit` for each buffer that an instruction touches, and for those of the asynchronous collectives that it waits for; for some more
 * than once. Updates the open collectives.
 */
export function visitWithWaits(i: Instruction, buffers: BufferTable, open: OpenCollectives, visit: (id: string) => void): void {
  visitTouched(i, buffers, visit);
  if (i.waits) for (const id of i.waits) for (const ended of endedBy(open, id)) visitTouched(ended, buffers, visit);
  if (i.kind === "collective" && i.stream) open.set(i.id, i);
}

/** Removes from the open collectives those that a wait for `id` is a wait for: itself, and all before it on its stream. Returns them. */
export function endedBy(open: OpenCollectives, id: string): Collective[] {
  const awaited = open.get(id);
  if (!awaited) return [];
  const ended: Collective[] = [];
  for (const i of open.values()) {
    if (i.stream !== awaited.stream) continue;
    ended.push(i);
    if (i === awaited) break;
  }
  for (const i of ended) open.delete(i.id);
  return ended;
}
