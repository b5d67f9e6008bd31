/**
 * The index of a Megatron data set (PREFIX.idx): the type and the number of the ids in PREFIX.bin.
 * Layout, little-endian (Megatron Core, datasets/indexed_dataset.py): "MMIDIDX\0\0", version u64 = 1, dtype u8, sequences S u64,
 * entries of documents N u64, lengths i32[S], byte offsets i64[S], first sequences of documents and their end i64[N], modes i8[S] or none.
 */
import { Trouble } from "../../schemas/trouble.ts";
import { type IdType, type Index, type Text, widthOf } from "./tokens.ts";

const HEADER = 34;
/** The types of ids by their DType code in indexed_dataset.py; 6 and 7 are floats. */
const dtypes: Readonly<Record<number, IdType>> = { 1: "u8", 2: "i8", 3: "i16", 4: "i32", 5: "i64", 8: "u16" };

/** Reads the header and the last sequence; the documents are consecutive in PREFIX.bin. Throws a Trouble if the index is incomplete or invalid. */
export function readIndex(file: Text): Index {
  const broken = (why: string) =>
    new Trouble(
      `${file.path}: the index of the corpus ${why}`,
      "copy or prepare the data set again; with data.path, the index may be removed and data.dtype set",
    );
  const view = (at: number, length: number): DataView => {
    if (at + length > file.bytes) throw broken(`ends at byte ${file.bytes}, in the middle`);
    const bytes = new Uint8Array(length);
    file.read(bytes, at);
    return new DataView(bytes.buffer);
  };
  const header = view(0, HEADER);
  const magic = "MMIDIDX\0\0";
  if (Array.from(magic, (_, i) => String.fromCharCode(header.getUint8(i))).join("") !== magic) throw broken("does not begin with MMIDIDX");
  const number = (at: number): number => Number(header.getBigUint64(at, true));
  const [version, code, sequences, entries] = [number(9), header.getUint8(17), number(18), number(26)];
  if (version !== 1) throw broken(`has version ${version}, not 1`);
  const dtype = dtypes[code];
  if (dtype === undefined) throw broken(`says that ids have type ${code}, which holds no whole numbers`);
  const size = HEADER + 12 * sequences + 8 * entries;
  if (file.bytes !== size && file.bytes !== size + sequences)
    throw broken(`has ${file.bytes} bytes; ${sequences} sequences and ${entries} entries of documents make ${size}`);
  if (sequences === 0 || entries < 2) throw broken("has no documents");
  const last = view(size - 8, 8).getBigInt64(0, true);
  if (Number(last) !== sequences) throw broken(`has documents of ${last} sequences, and ${sequences} sequences`);
  const length = view(HEADER + 4 * (sequences - 1), 4).getInt32(0, true);
  const offset = Number(view(HEADER + 4 * sequences + 8 * (sequences - 1), 8).getBigInt64(0, true));
  const count = offset / widthOf(dtype) + length;
  if (!Number.isSafeInteger(count) || length < 0 || offset < 0) throw broken(`has a last sequence of ${length} ids at byte ${offset}`);
  return { dtype, count, documents: entries - 1, sequences };
}

/** Reads the lengths of all sequences, in ids. Throws a Trouble if they do not add up to the number of ids. */
export function readLengths(file: Text, { sequences, count }: Index): Int32Array<ArrayBuffer> {
  const bytes = new Uint8Array(4 * sequences);
  file.read(bytes, HEADER);
  // a copy: the field is not aligned in the file, and numbers of this machine are little-endian like the file's
  const lengths = new Int32Array(bytes.buffer);
  const sum = lengths.reduce((all, length) => all + length, 0);
  if (sum === count && lengths.every((length) => length >= 0)) return lengths;
  throw new Trouble(
    `${file.path}: the lengths of the index add up to ${sum} ids, and the last sequence ends at id ${count}`,
    "write the data set again",
  );
}
