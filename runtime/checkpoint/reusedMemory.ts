/** Memory that reads of files use one after another: arrays of each read would fill the memory until they are collected. */

/** Bytes by which the memory grows, and those of a part with the ranges around it: memory that grew would leave arrays to collect. */
const [UNIT, FIRST] = [2 ** 22, 3 * 2 ** 22];

/** A buffer, and which bytes of which tensor it has. */
export class ReusedMemory {
  #buffer = new ArrayBuffer(0);
  #name = "";
  #from = 0;
  #to = 0;

  /** The memory that `view` makes views of. */
  get buffer(): ArrayBuffer {
    return this.#buffer;
  }

  /**
   * Prepares a read of bytes [from, to) of a tensor. Bytes of the read before with which it begins are moved to the begin of the memory;
   * returns how many. Until `hold` the memory has no bytes of use, as the read may fail.
   */
  begin(name: string, from: number, to: number): number {
    const isKnown = this.#name === name && from >= this.#from && from < this.#to;
    const known = isKnown ? Math.min(this.#to, to) - from : 0;
    const offset = from - this.#from;
    this.#name = "";
    const held = new Uint8Array(this.#buffer);
    if (this.#buffer.byteLength < to - from) {
      this.#buffer = new ArrayBuffer(Math.max(FIRST, Math.ceil((to - from) / UNIT) * UNIT));
      if (known > 0) new Uint8Array(this.#buffer).set(held.subarray(offset, offset + known));
    } else if (known > 0) held.copyWithin(0, offset, offset + known);
    return known;
  }

  /** Returns the first bytes of the memory. */
  view(bytes: number): Uint8Array {
    return new Uint8Array(this.#buffer, 0, bytes);
  }

  /** Records that the memory has bytes [from, to) of a tensor, which are checked. */
  hold(name: string, from: number, to: number): void {
    [this.#name, this.#from, this.#to] = [name, from, to];
  }

  /** Returns memory for so many floats, whose content is of no use. */
  floats(count: number): Float32Array {
    this.begin("", 0, 4 * count);
    return new Float32Array(this.#buffer, 0, count);
  }
}
