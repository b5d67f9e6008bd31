/** A writer of protobuf messages (proto3 wire format), as far as exports need it. Empty values are left out, as proto3 does. */

/** The bytes of one message, field by field. */
export class Message {
  readonly #bytes: number[] = [];

  /** Adds an unsigned or an int64 field that is not negative. Values are at most 2^53 - 1. */
  uint(field: number, value: number): this {
    return value === 0 ? this : this.member(field, value);
  }
  /** Adds a member of a oneof, which is written also if it is zero. */
  member(field: number, value: number): this {
    this.#varint(field * 8);
    this.#varint(value);
    return this;
  }
  text(field: number, value: string): this {
    return value === "" ? this : this.#block(field, Buffer.from(value, "utf8"));
  }
  /** Adds a nested message, also if it is empty. */
  message(field: number, value: Message): this {
    return this.#block(field, value.#bytes);
  }
  /** Adds a packed list of unsigned numbers. */
  list(field: number, values: readonly number[]): this {
    if (values.length === 0) return this;
    const packed = new Message();
    for (const value of values) packed.#varint(value);
    return this.#block(field, packed.#bytes);
  }
  /** Returns the message with its length before it, so that a file can hold several. */
  delimited(): Uint8Array {
    const length = new Message();
    length.#varint(this.#bytes.length);
    return Uint8Array.from([...length.#bytes, ...this.#bytes]);
  }

  #block(field: number, bytes: ArrayLike<number> & Iterable<number>): this {
    this.#varint(field * 8 + 2);
    this.#varint(bytes.length);
    for (const byte of bytes) this.#bytes.push(byte);
    return this;
  }
  #varint(value: number): void {
    let rest = value;
    for (; rest > 127; rest = Math.floor(rest / 128)) this.#bytes.push((rest % 128) + 128);
    this.#bytes.push(rest);
  }
}
