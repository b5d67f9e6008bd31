/** The buffers of a program by id. Code that names a buffer which does not exist gets an invariant with the id instead of undefined. */

import { bytesOf } from "../../schemas/dtypes.ts";
import type { Buffer, Program } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { invariant } from "../ops/op.ts";

/** The buffers of a program by id. */
export class BufferTable {
  readonly #byId: Map<string, Buffer>;

  constructor(buffers: Iterable<Buffer> = []) {
    this.#byId = new Map();
    for (const b of buffers) this.#byId.set(b.id, b);
  }
  /** Returns a buffer. Throws an invariant if none has this id. */
  get(id: string): Buffer {
    const found = this.#byId.get(id);
    invariant(found !== undefined, () => `${id} is not a buffer`);
    return found;
  }
  find(id: string): Buffer | undefined {
    return this.#byId.get(id);
  }
  has(id: string): boolean {
    return this.#byId.has(id);
  }
  /** Adds a buffer unless its id exists. Returns the id. */
  add(b: Buffer): string {
    if (!this.#byId.has(b.id)) this.#byId.set(b.id, b);
    return b.id;
  }
  delete(id: string): void {
    this.#byId.delete(id);
  }
  values(): Iterable<Buffer> {
    return this.#byId.values();
  }
  /** Returns the id of the buffer that holds the bytes of a buffer: itself, unless it lies in another. */
  rootOf(id: string): string {
    const { within, part } = this.get(id);
    const outer = within ?? part?.of;
    return outer === undefined ? id : this.rootOf(outer);
  }
  /** Returns whether two buffers share bytes. */
  overlap(a: string, b: string): boolean {
    if (a === b) return true;
    if (this.rootOf(a) !== this.rootOf(b)) return false;
    const [first, second] = [this.get(a), this.get(b)];
    if (!first.part || !second.part || first.part.of !== second.part.of) return true;
    const isBefore = (x: Buffer, y: Buffer): boolean => (x.part?.at ?? 0) + elementsOf(x.shape) <= (y.part?.at ?? 0);
    return !isBefore(first, second) && !isBefore(second, first);
  }
  /** Returns the number of elements of a buffer on one rank. */
  lengthOf(id: string): number {
    return elementsOf(this.get(id).shape);
  }
  /** Returns the bytes of a buffer on one rank. */
  bytesOf(id: string): number {
    return bytesOf[this.get(id).dtype] * this.lengthOf(id);
  }
}

const tables = new WeakMap<readonly Buffer[], BufferTable>();

/** Returns the buffers of a program of a plan, whose reports share one table. The passes of the compiler, which change buffers, make tables of their own. */
export function buffersOf({ buffers }: Pick<Program, "buffers">): BufferTable {
  const table = tables.get(buffers) ?? new BufferTable(buffers);
  tables.set(buffers, table);
  return table;
}
