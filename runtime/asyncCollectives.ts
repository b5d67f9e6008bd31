/**
 * Asynchronous collectives of ranks that are coroutines of one process. A rank begins a collective and goes on; it is performed when all
 * members of its group have begun it and all earlier ones on their streams are done, at the latest when a member waits for it.
 */
import type { Collective } from "../schemas/plan.ts";

/** A collective that some members of its group have begun. */
interface Entry {
  readonly key: string;
  readonly i: Collective;
  readonly copy: number;
  readonly group: readonly number[];
  readonly began: Set<number>;
}

/** What asynchronous collectives need of the communication. */
export interface AsyncNeeds {
  groupOf(rank: number, i: Collective): readonly number[];
  perform(group: readonly number[], i: Collective, copy: number): void;
  /** Returns whether a collective that could be performed is left until a member waits for it. Default: never. */
  readonly isHeld?: ((i: Collective) => boolean) | undefined;
}

/** The streams of all ranks. */
export class AsyncCollectives {
  readonly #needs: AsyncNeeds;
  /** By group and instruction, what is begun and not performed, in the order of its first begin. */
  readonly #open = new Map<string, Entry>();
  /** By rank, then by stream, the same in the order of the stream. */
  readonly #streams = new Map<number, Map<Collective["stream"], Entry[]>>();

  constructor(needs: AsyncNeeds) {
    this.#needs = needs;
  }

  /** Begins a collective of a rank. */
  begin(rank: number, i: Collective, copy: number): void {
    const group = this.#needs.groupOf(rank, i);
    const key = `${i.id}|${group[0]}`;
    const entry = this.#open.get(key) ?? { key, i, copy, group, began: new Set<number>() };
    this.#open.set(key, entry);
    entry.began.add(rank);
    this.#queueOf(rank, i).push(entry);
    for (const ready of this.#open.values()) if (!this.#needs.isHeld?.(ready.i)) this.#perform(ready);
  }

  /** Performs what a rank waits for: a collective by its id, or all. Returns false while members of its group are missing. */
  wait(rank: number, id?: string): boolean {
    for (const queue of this.#streams.get(rank)?.values() ?? [])
      for (const entry of [...queue])
        if ((id === undefined || entry.i.id === id) && this.#open.get(entry.key) === entry && !this.#perform(entry)) return false;
    return true;
  }

  /** Performs a collective after those before it on the streams of its members. Returns false while ranks are missing. */
  #perform(entry: Entry): boolean {
    if (entry.began.size < entry.group.length) return false;
    for (const rank of entry.group)
      for (let [first] = this.#queueOf(rank, entry.i); first && first !== entry; [first] = this.#queueOf(rank, entry.i))
        if (!this.#perform(first)) return false;
    this.#needs.perform(entry.group, entry.i, entry.copy);
    for (const rank of entry.group) this.#queueOf(rank, entry.i).shift();
    this.#open.delete(entry.key);
    return true;
  }

  #queueOf(rank: number, { stream }: Collective): Entry[] {
    const streams = this.#streams.get(rank) ?? new Map<Collective["stream"], Entry[]>();
    this.#streams.set(rank, streams);
    const queue = streams.get(stream) ?? [];
    streams.set(stream, queue);
    return queue;
  }
}

const known = new WeakMap<Collective, readonly Collective[]>();
/** Returns a collective for each pair of buffers of a bucket, always the same objects; a collective of one pair is its own. */
export function membersOf(i: Collective): readonly Collective[] {
  if (!i.more) return [i];
  const { more, ...first } = i;
  const found = known.get(i) ?? [first, ...more.map((pair) => ({ ...first, ...pair }))];
  known.set(i, found);
  return found;
}
