/**
 * Reads what torch.save writes, within a range of a file: a ZIP archive whose entries are stored without compression, with a pickle that
 * refers to the bytes of tensors. Entries are found through the archive's central directory.
 */
import { Trouble } from "../../../schemas/trouble.ts";
import { PersistentId, PickledName, PickledObject, type PickleValue, readPickle } from "./pickle.ts";

/** Reads bytes of a file: fills `into` from byte `at` of the range. */
export interface ByteRange {
  readonly where: string;
  readonly bytes: number;
  read(into: Uint8Array, at: number): void;
}

/** A tensor in a range: strides and offset in elements, `start` in bytes from the start of the range. */
export interface StoredTensor {
  readonly dtype: StorageDtype;
  readonly sizes: readonly number[];
  readonly strides: readonly number[];
  readonly start: number;
  /** Elements that the storage has after `start`. */
  readonly elements: number;
}

/** Element types of weights, and their bytes. */
export const storageBytes = { bf16: 2, f16: 2, f32: 4, f64: 8 } as const;
/** One of the types of `storageBytes`. */
export type StorageDtype = keyof typeof storageBytes;
const storages: Readonly<Record<string, StorageDtype>> = {
  "torch.BFloat16Storage": "bf16",
  "torch.HalfStorage": "f16",
  "torch.FloatStorage": "f32",
  "torch.DoubleStorage": "f64",
};

const COPY = "copy the checkpoint again";

/** Returns the pickled value of the archive, and where its entries begin. */
function openArchive(range: ByteRange): { readonly value: PickleValue; readonly entries: ReadonlyMap<string, Entry> } {
  const entries = entriesOf(range);
  const [name, entry] = [...entries].find(([path]) => path.endsWith("/data.pkl")) ?? [];
  if (!entry) throw new Trouble(`${range.where}: the archive has no data.pkl`, COPY);
  const order = entries.get(`${name?.slice(0, -"data.pkl".length)}byteorder`);
  if (order && new TextDecoder().decode(bytesAt(range, order.start, order.bytes)) !== "little")
    throw new Trouble(`${range.where}: the archive was written on a big-endian machine`, "save the checkpoint on a little-endian machine");
  return { value: readPickle(bytesAt(range, entry.start, entry.bytes), range.where), entries };
}

/** Reads a value without tensors. */
export const readObject = (range: ByteRange): PickleValue => openArchive(range).value;

/** Reads the description of one tensor. Throws a Trouble for another value, and for a type that weights do not have. */
export function readTensor(range: ByteRange): StoredTensor {
  const { value, entries } = openArchive(range);
  if (!(value instanceof PickledObject) || value.type !== "torch._utils._rebuild_tensor_v2")
    throw new Trouble(
      `${range.where} is no plain tensor${value instanceof PickledObject ? `, but ${value.type}` : ""}`,
      "import weights in bf16, fp16 or fp32",
    );
  const [storage, offset, sizes, strides] = value.args;
  const id = storage instanceof PersistentId && Array.isArray(storage.id) ? storage.id : [];
  const type = id[1] instanceof PickledName ? id[1].name : "";
  const dtype = storages[type];
  if (!dtype) throw new Trouble(`${range.where} holds ${type || "an unknown type"}`, "import weights in bf16, fp16 or fp32");
  const entry = [...entries].find(([path]) => path.endsWith(`/data/${id[2]}`))?.[1];
  if (!entry || !isSizes(sizes) || !isSizes(strides) || typeof offset !== "number" || sizes.length !== strides.length)
    throw new Trouble(`${range.where}: the tensor is not described as torch.save does`, COPY);
  const size = storageBytes[dtype];
  const last = sizes.reduce((sum, n, i) => sum + (n - 1) * (strides[i] ?? 0), offset);
  if (sizes.every((n) => n > 0) && (last + 1) * size > entry.bytes)
    throw new Trouble(`${range.where}: the tensor ends at element ${last + 1}, its storage at ${entry.bytes / size}`, COPY);
  return { dtype, sizes, strides, start: entry.start + offset * size, elements: entry.bytes / size - offset };
}

const isSizes = (value: PickleValue | undefined): value is number[] =>
  Array.isArray(value) && value.every((n) => typeof n === "number" && Number.isSafeInteger(n) && n >= 0);

interface Entry {
  readonly start: number;
  readonly bytes: number;
}

function bytesAt(range: ByteRange, at: number, bytes: number): Uint8Array {
  if (at < 0 || bytes < 0 || at + bytes > range.bytes) throw new Trouble(`${range.where}: the archive is cut or damaged`, COPY);
  const out = new Uint8Array(bytes);
  range.read(out, at);
  return out;
}

const END = 0x06054b50;
const END64 = 0x06064b50;
const LOCATOR64 = 0x07064b50;
const DIRECTORY = 0x02014b50;
const LOCAL = 0x04034b50;
/** The largest central directory that is read, in bytes. */
const MOST_DIRECTORY = 64 * 2 ** 20;

/** Lists the entries of the archive: where their bytes begin in the range. */
function entriesOf(range: ByteRange): ReadonlyMap<string, Entry> {
  const broken = (what: string): Trouble => new Trouble(`${range.where}: ${what}: not an archive of torch.save, or a damaged one`, COPY);
  const tail = bytesAt(range, Math.max(0, range.bytes - 65_557), Math.min(range.bytes, 65_557));
  const view = new DataView(tail.buffer);
  let end = tail.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== END) end--;
  if (end < 0) throw broken("no end of a ZIP archive");
  let size = view.getUint32(end + 12, true);
  let start = view.getUint32(end + 16, true);
  if (end >= 20 && view.getUint32(end - 20, true) === LOCATOR64) {
    const record = new DataView(bytesAt(range, Number(view.getBigUint64(end - 12, true)), 56).buffer);
    if (record.getUint32(0, true) !== END64) throw broken("no 64-bit end record");
    size = Number(record.getBigUint64(40, true));
    start = Number(record.getBigUint64(48, true));
  }
  if (size > MOST_DIRECTORY) throw broken(`a central directory of ${size} bytes`);
  const directory = new DataView(bytesAt(range, start, size).buffer);
  const entries = new Map<string, Entry>();
  for (let at = 0; at + 46 <= size; ) {
    if (directory.getUint32(at, true) !== DIRECTORY) throw broken("a central directory without its signature");
    const [nameLength, extraLength, commentLength] = [28, 30, 32].map((n) => directory.getUint16(at + n, true)) as [number, number, number];
    const name = new TextDecoder().decode(new Uint8Array(directory.buffer, at + 46, nameLength));
    if (directory.getUint16(at + 10, true) !== 0) throw broken(`${name} is compressed`);
    let [bytes, local] = [directory.getUint32(at + 24, true), directory.getUint32(at + 42, true)];
    const wide = [bytes, directory.getUint32(at + 20, true), local].filter((n) => n === 0xffffffff).length;
    if (wide > 0) [bytes, local] = wideSizes(new DataView(directory.buffer, at + 46 + nameLength, extraLength), bytes, local);
    const header = new DataView(bytesAt(range, local, 30).buffer);
    if (header.getUint32(0, true) !== LOCAL) throw broken(`${name} has no local header`);
    entries.set(name, { start: local + 30 + header.getUint16(26, true) + header.getUint16(28, true), bytes });
    at += 46 + nameLength + extraLength + commentLength;
  }
  return entries;
}

/** Reads sizes and offset above 32 bits from the extra field 1. */
function wideSizes(extra: DataView, bytes: number, local: number): [number, number] {
  for (let at = 0; at + 4 <= extra.byteLength; at += 4 + extra.getUint16(at + 2, true)) {
    if (extra.getUint16(at, true) !== 1) continue;
    const values: number[] = [];
    for (let i = 0; i + 8 <= extra.getUint16(at + 2, true); i += 8) values.push(Number(extra.getBigUint64(at + 4 + i, true)));
    const wide = bytes === 0xffffffff ? (values.shift() ?? bytes) : bytes;
    // the compressed size, equal to the other
    if (bytes === 0xffffffff && values.length > 1) values.shift();
    return [wide, local === 0xffffffff ? (values.shift() ?? local) : local];
  }
  return [bytes, local];
}
