/** The `.idx` file that Megatron Core writes beside the `.bin` of a data set. */
import { littleEndian } from "./labels.ts";

/** The index of a data set: one document for each sequence, `code` the type of the ids, which take `width` bytes, `lengths` ids in each. */
export function megatronIndex(code: number, width: number, lengths: readonly number[]): Buffer {
  const header = Buffer.alloc(34);
  header.write("MMIDIDX");
  header.writeBigUInt64LE(1n, 9);
  header.writeUInt8(code, 17);
  header.writeBigUInt64LE(BigInt(lengths.length), 18);
  header.writeBigUInt64LE(BigInt(lengths.length + 1), 26);
  const i64 = (numbers: readonly number[]) => Buffer.from(BigInt64Array.from(numbers, BigInt).buffer);
  let end = 0;
  const offsets = lengths.map((length) => (end += length * width) - length * width);
  return Buffer.concat([header, littleEndian(lengths, "i32"), i64(offsets), i64([...lengths.keys(), lengths.length])]);
}
