/** Reads the wire format of protocol buffers: fields of a message by number. */

/** A field: its number and its value; `bytes` for texts, bytes and messages. */
export interface ProtoField {
  readonly number: number;
  readonly value: number;
  readonly bytes: Uint8Array;
}

const none = new Uint8Array();

/** Visits the fields of a message in order. Throws a RangeError if the message ends within a field or has an unknown wire type. */
export function* protoFields(message: Uint8Array): Generator<ProtoField> {
  const view = new DataView(message.buffer, message.byteOffset, message.byteLength);
  let at = 0;
  const varint = (): number => {
    for (let value = 0, factor = 1; ; factor *= 128) {
      const byte = view.getUint8(at++);
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const key = varint();
    const [number, wire] = [Math.floor(key / 8), key % 8];
    if (wire === 0) yield { number, value: varint(), bytes: none };
    else if (wire === 5 || wire === 1) {
      const value = wire === 5 ? view.getFloat32(at, true) : view.getFloat64(at, true);
      at += wire === 5 ? 4 : 8;
      yield { number, value, bytes: none };
    } else if (wire === 2) {
      const length = varint();
      if (at + length > message.length) throw new RangeError("the message ends within a field");
      yield { number, value: length, bytes: message.subarray(at, at + length) };
      at += length;
    } else throw new RangeError(`wire type ${wire}`);
  }
}
