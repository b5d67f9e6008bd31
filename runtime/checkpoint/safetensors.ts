/**
 * Safetensors files: 8 bytes of header length, a JSON header, the bytes of all tensors one after another.
 * Opening reads and checks the header alone: after it every tensor is known to lie whole in the file. Writing leaves all or nothing.
 * A file of a checkpoint has the SHA-256 of each tensor in its header's metadata: reading a tensor checks it, without a second pass over
 * the file, and the SHA-256 of the header stands for the whole file.
 */
import { createHash } from "node:crypto";
import { closeSync, fsyncSync, openSync, renameSync, rmSync, writeSync } from "node:fs";
import { type Dtype, dtypeNames, dtypes, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { unwritten } from "../../schemas/writing.ts";
import { openInput } from "../data/inputFile.ts";
import type { ReusedMemory } from "./reusedMemory.ts";

/** The header entry of a tensor. `start`: bytes from the beginning of the file. */
type TensorInfo = {
  /** The name of the element type in the header. */
  readonly dtype: string;
  readonly decoder: Decoder;
  readonly shape: readonly number[];
  readonly start: number;
  readonly bytes: number;
};

type Metadata = Readonly<Record<string, string>>;

/** The SHA-256 of bytes `from` to `to` of a tensor, hexadecimal. */
export interface PartDigest {
  readonly from: number;
  readonly to: number;
  readonly sha256: string;
}

/** An open safetensors file. */
export type Safetensors = {
  readonly path: string;
  readonly names: readonly string[];
  readonly metadata: Metadata;
  /** SHA-256 of the header, hexadecimal. */
  readonly headerDigest: string;
  readonly info: (name: string) => TensorInfo;
  /** Returns the digests of consecutive parts of a tensor; none if the file has no digests. */
  readonly digestsOf: (name: string) => readonly PartDigest[];
  readonly read: (name: string) => Float32Array;
  /**
   * Reads the elements [from, to) of a tensor, and checks the digests of the parts that they lie in. An f32 result uses the memory of
   * `reused`, and bytes that the call before has read there are not read again.
   */
  readonly readElements: (name: string, from: number, to: number, reused?: ReusedMemory) => Float32Array;
  readonly readInts: (name: string) => Int32Array;
  readonly close: () => void;
};

/** A tensor to write. */
export type TensorEntry = { readonly name: string; readonly dtype: "F32"; readonly shape: readonly number[]; readonly data: Float32Array };
/** A tensor to write whose values are read just before they are written. */
export type DeferredTensorEntry = Omit<TensorEntry, "data"> & { readonly data: () => Promise<Float32Array> };

// The bound of the format. It prevents a huge allocation for a damaged length.
const MAX_HEADER = 100_000_000;

/** Opens a safetensors file. Throws a Trouble if it is invalid; `info` and `read` throw one if a tensor is missing or its digest differs. */
export function openSafetensors(path: string): Safetensors {
  const file = openInput(path, "the safetensors file", "a relative path starts at the working directory");
  const { tensors, metadata, headerDigest } = closedOnTrouble(file.close, () => {
    const length = headerLength(path, file.bytes, (into) => file.read(into, 0));
    const header = new Uint8Array(length);
    file.read(header, 8);
    return { ...readHeader(path, header, 8 + length, file.bytes), headerDigest: sha256(header) };
  });
  const info = (name: string): TensorInfo => {
    const found = tensors.get(name);
    if (found === undefined) throw new Trouble(`${path}: has no tensor ${name}`, `it holds ${some([...tensors.keys()])}`);
    return found;
  };
  /** Reads bytes of a tensor, and compares the digests of these parts of it; `known`: bytes at the begin of `view` that are there. */
  const load = (name: string, first: number, view: Uint8Array, parts: readonly PartDigest[], known = 0): void => {
    file.read(view.subarray(known), info(name).start + first + known);
    for (const { from, to, sha256: digest } of parts)
      if (from >= first + known && digest !== sha256(view.subarray(from - first, to - first))) throw damaged(path, name);
  };
  const readWhole = (name: string): ArrayBuffer => {
    const memory = new ArrayBuffer(info(name).bytes);
    load(name, 0, new Uint8Array(memory), digestsOf(name));
    return memory;
  };
  const readElements = (name: string, from: number, to: number, reused?: ReusedMemory): Float32Array => {
    const { decoder, dtype } = info(name);
    const parts = digestsOf(name).filter((part) => part.from < to * decoder.bytes && part.to > from * decoder.bytes);
    const [first, end] = [parts[0]?.from ?? from * decoder.bytes, parts.at(-1)?.to ?? to * decoder.bytes];
    const skipped = from - first / decoder.bytes;
    const memory = dtype === "F32" ? reused : undefined;
    if (memory === undefined) {
      const own = new ArrayBuffer(end - first);
      load(name, first, new Uint8Array(own), parts);
      return decoder.floats(own).subarray(skipped, skipped + to - from);
    }
    const known = memory.begin(`${path}: ${name}`, first, end);
    load(name, first, memory.view(end - first), parts, known);
    memory.hold(`${path}: ${name}`, first, end);
    return new Float32Array(memory.buffer, 4 * skipped, to - from);
  };
  const digestsOf = (name: string): PartDigest[] => {
    const digests = metadata[digestKey(name)]?.match(/.{1,64}/g) ?? [];
    const { bytes } = info(name);
    const each = Number(metadata[DIGEST_BYTES] ?? Math.max(1, bytes));
    if (digests.length > 0 && digests.length !== Math.max(1, Math.ceil(bytes / each)))
      throw new Trouble(`${path}: tensor ${name} has ${digests.length} digests for ${bytes} bytes`, REMAKE);
    return digests.map((digest, n) => ({ from: n * each, to: Math.min((n + 1) * each, bytes), sha256: digest }));
  };
  return {
    path,
    names: [...tensors.keys()],
    metadata,
    headerDigest,
    info,
    digestsOf,
    read: (name) => info(name).decoder.floats(readWhole(name)),
    readElements,
    readInts: (name) => {
      const { dtype, decoder } = info(name);
      const { ints } = decoder;
      if (ints === undefined) throw new Trouble(`${path}: tensor ${name} holds ${dtype}, not integers`, "store it as I32 or I64");
      const values = ints(readWhole(name));
      return Int32Array.from({ length: values.length }, (_, i) => {
        const value = Number(values[i]);
        if (value !== (value | 0))
          throw new Trouble(`${path}: tensor ${name} holds ${values[i]}, which 32 bits do not`, "store smaller integers");
        return value;
      });
    },
    close: file.close,
  };
}

/** Older versions of transformers reject a file without the metadata key `format`, the framework that saved it. */
const PYTORCH = { format: "pt" };

/** Writes a temporary file and renames it to `path`, so that a reader sees the old file or the complete new one. Throws a Trouble on a file system error. */
export function writeSafetensors(path: string, entries: Iterable<TensorEntry>): void {
  const all = [...entries];
  for (const { name, shape, data } of all) expectLength(name, shape, data);
  const file = new PartFile(path);
  try {
    file.write(headerOf(all, PYTORCH));
    for (const { data } of all) file.write(bytesOf(data));
    file.commit();
  } catch (error) {
    throw file.discard(error);
  }
}

/**
 * Like `writeSafetensors`, for values that arrive one tensor after the other, so that one of them is in memory at a time. The metadata
 * contains the SHA-256 of each tensor: the header is written with zeros in their place first, and again when all are known.
 */
export async function streamSafetensors(path: string, entries: readonly DeferredTensorEntry[], metadata: Metadata): Promise<void> {
  const digests = new Map(entries.map(({ name }) => [digestKey(name), "0".repeat(64)]));
  const header = () => headerOf(entries, { ...metadata, ...Object.fromEntries(digests) });
  const file = new PartFile(path);
  try {
    file.write(header());
    for (const { name, shape, data } of entries) {
      const values = await data();
      expectLength(name, shape, values);
      file.write(bytesOf(values));
      digests.set(digestKey(name), sha256(bytesOf(values)));
    }
    file.write(header(), 0);
    file.commit();
  } catch (error) {
    throw file.discard(error);
  }
}

/** A file beside `path` that takes its place when it is complete. */
class PartFile {
  readonly #path: string;
  readonly #part: string;
  readonly #fd: number;
  #isOpen = true;

  /** Throws a Trouble if the file cannot be created. */
  constructor(path: string) {
    this.#path = path;
    this.#part = `${path}.${process.pid}.part`;
    try {
      this.#fd = openSync(this.#part, "w");
    } catch (error) {
      throw unwritten(path, error);
    }
  }

  /** `at`: the byte offset to write at; undefined: the current position. */
  write(bytes: Uint8Array, at?: number): void {
    writeAll(this.#fd, bytes, at);
  }

  /** Flushes the file to the disk and renames it. */
  commit(): void {
    fsyncSync(this.#fd);
    this.#close();
    renameSync(this.#part, this.#path);
  }

  /** Removes the file. Returns the error to throw: a Trouble if `error` is one of the file system. */
  discard(error: unknown): unknown {
    if (this.#isOpen) this.#close();
    rmSync(this.#part, { force: true });
    return unwritten(this.#path, error);
  }

  #close(): void {
    this.#isOpen = false;
    closeSync(this.#fd);
  }
}

/** Returns the metadata key of a tensor's SHA-256, one of each part after the other. */
export const digestKey = (tensor: string): string => `sha256/${tensor}`;
/** The metadata key of the bytes of such a part; absent: a tensor is one part. */
export const DIGEST_BYTES = "sha256_bytes";
/** Returns the error of a tensor whose bytes differ from those that were saved. */
export const damaged = (path: string, tensor: string): Trouble =>
  new Trouble(`${path}: the SHA-256 of tensor ${tensor} differs from the one it was saved with: the file is damaged`, REMAKE);
/** Returns the SHA-256 in hexadecimal. */
export const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");
const bytesOf = (data: Float32Array): Uint8Array => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

function expectLength(name: string, shape: readonly number[], data: Float32Array): void {
  if (data.length !== elementsOf(shape)) throw new Error(`${name}: ${data.length} values for shape ${list(shape)}`);
}

/** Returns the bytes before the tensors: the length of the header, and the header. Tensors follow one another in this order. */
export function headerOf(
  entries: readonly { readonly name: string; readonly dtype: string; readonly shape: readonly number[] }[],
  metadata: Metadata,
): Uint8Array {
  const header: Record<string, unknown> = Object.assign(Object.create(null), { __metadata__: metadata });
  let at = 0;
  for (const { name, dtype, shape } of entries) {
    if (name in header) throw new Error(`${name} is written twice`);
    const decoder = decoders.get(dtype);
    if (!decoder) throw new Error(`${name} has dtype ${dtype}`);
    header[name] = { dtype, shape, data_offsets: [at, (at += elementsOf(shape) * decoder.bytes)] };
  }
  const text = Buffer.from(JSON.stringify(header));
  // Pad with spaces to a multiple of 8, so that tensors are aligned when the file is mapped.
  const padded = Buffer.concat([Buffer.alloc(8), text, Buffer.alloc(-text.length & 7, " ")]);
  padded.writeBigUInt64LE(BigInt(padded.length - 8));
  return padded;
}

/** `at`: the byte offset to write at; undefined: the current position. */
function writeAll(fd: number, bytes: Uint8Array, at?: number): void {
  for (let done = 0; done < bytes.length; )
    done += writeSync(fd, bytes, done, Math.min(bytes.length - done, 2 ** 30), at === undefined ? null : at + done);
}

interface Decoder {
  readonly bytes: number;
  readonly floats: (buffer: ArrayBuffer) => Float32Array;
  readonly ints?: (buffer: ArrayBuffer) => ArrayLike<number> | ArrayLike<bigint>;
}

// Multi-byte values are little-endian in the format, as on every machine Node runs a GPU on.
const decoders: ReadonlyMap<string, Decoder> = new Map<string, Decoder>([
  ...dtypeNames.map((dtype): [string, Decoder] => [dtypes[dtype].safetensors, decoderOf(dtype)]),
  // types of files alone
  ["F64", { bytes: 8, floats: (b) => Float32Array.from(new Float64Array(b)) }],
  ["I64", { bytes: 8, floats: (b) => Float32Array.from(Array.from(new BigInt64Array(b), Number)), ints: (b) => new BigInt64Array(b) }],
  ["U8", { bytes: 1, floats: (b) => Float32Array.from(new Uint8Array(b)), ints: (b) => new Uint8Array(b) }],
]);

function decoderOf(dtype: Dtype): Decoder {
  const { bytes, kind } = dtypes[dtype];
  const valuesOf = (buffer: ArrayBuffer) => valuesIn(typedMemory(dtype, buffer));
  const floats = (buffer: ArrayBuffer): Float32Array => {
    const values = valuesOf(buffer);
    return values instanceof Float32Array ? values : Float32Array.from(values);
  };
  return kind === "integer" ? { bytes, floats, ints: valuesOf } : { bytes, floats };
}

const REMAKE = "download or save it again";

function headerLength(path: string, fileBytes: number, readFirst: (into: Uint8Array) => void): number {
  if (fileBytes < 8)
    throw new Trouble(
      `${path}: ${fileBytes} bytes is too short for a safetensors file, which starts with 8 bytes of header length`,
      REMAKE,
    );
  const first = Buffer.alloc(8);
  readFirst(first);
  const length = first.readBigUInt64LE();
  if (length > MAX_HEADER)
    throw new Trouble(
      `${path}: claims a header of ${length} bytes, over the format's 100 MB: not a safetensors file`,
      "name a safetensors file",
    );
  if (8n + length > BigInt(fileBytes))
    throw new Trouble(`${path}: the header should end at byte ${8n + length}, the file ends at ${fileBytes}: it was cut`, REMAKE);
  return Number(length);
}

interface Header {
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: Metadata;
}
function readHeader(path: string, bytes: Uint8Array, dataStart: number, fileBytes: number): Header {
  const header = parse(path, bytes);
  const tensors = new Map<string, TensorInfo>();
  for (const [name, entry] of Object.entries(header)) {
    if (name !== "__metadata__") tensors.set(name, readEntry(`${path}: tensor ${name}`, entry, dataStart, fileBytes));
  }
  // Tensors are contiguous and the last one ends the file; this detects overlaps and truncation.
  let end = dataStart;
  let before = "the header";
  for (const [name, { start, bytes: size }] of [...tensors].sort(([, a], [, b]) => a.start - b.start || a.bytes - b.bytes)) {
    if (start !== end) {
      const how = start < end ? `overlaps ${before} by ${end - start} bytes` : `leaves ${start - end} unused bytes after ${before}`;
      throw new Trouble(`${path}: tensor ${name} ${how}`, REMAKE);
    }
    end = start + size;
    before = name;
  }
  if (end !== fileBytes) throw new Trouble(`${path}: the tensors end at byte ${end}, the file at ${fileBytes}`, REMAKE);
  return { tensors, metadata: metadataOf(header) };
}

/** Returns the string values of the metadata. Some files have null, or other values, against the format. */
function metadataOf(header: object): Metadata {
  const { __metadata__: given } = header as Record<string, unknown>;
  const texts = isObject(given) ? Object.entries(given).filter(([, value]) => typeof value === "string") : [];
  return Object.fromEntries(texts);
}

function parse(path: string, bytes: Uint8Array): object {
  let header: unknown;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new Trouble(`${path}: the header is not JSON: not a safetensors file, or a damaged one`, REMAKE);
  }
  if (!isObject(header)) throw new Trouble(`${path}: the header is not a JSON object`, REMAKE);
  return header;
}

function readEntry(at: string, entry: unknown, dataStart: number, fileBytes: number): TensorInfo {
  if (!isObject(entry)) throw new Trouble(`${at} has a header entry that is not an object`, REMAKE);
  const { dtype, shape, data_offsets: offsets } = entry as Record<string, unknown>;
  const decoder = typeof dtype === "string" ? decoders.get(dtype) : undefined;
  if (typeof dtype !== "string" || decoder === undefined) {
    throw new Trouble(
      `${at} has dtype ${JSON.stringify(dtype)}, which rankc does not read`,
      `convert it to one of ${[...decoders.keys()].join(", ")}`,
    );
  }
  if (!isCounts(shape)) throw new Trouble(`${at} has no valid shape: ${JSON.stringify(shape)}`, REMAKE);
  if (!isCounts(offsets) || offsets.length !== 2 || offsets[0]! > offsets[1]!) {
    throw new Trouble(`${at} has no valid data_offsets: ${JSON.stringify(offsets)}`, REMAKE);
  }
  const [from, to] = offsets as [number, number];
  const bytes = elementsOf(shape) * decoder.bytes;
  if (to - from !== bytes) throw new Trouble(`${at} has ${to - from} bytes; ${dtype} ${list(shape)} takes ${bytes}`, REMAKE);
  if (dataStart + to > fileBytes)
    throw new Trouble(`${at} should end at byte ${dataStart + to}, the file ends at ${fileBytes}: it was cut`, REMAKE);
  return { dtype, decoder, shape, start: dataStart + from, bytes };
}

const isObject = (value: unknown): value is object => typeof value === "object" && value !== null && !Array.isArray(value);
const isCounts = (value: unknown): value is number[] => Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0);
const list = (shape: readonly number[]): string => `[${shape.join(", ")}]`;
const some = (names: readonly string[]): string =>
  names.slice(0, 5).join(", ") + (names.length > 5 ? `, and ${names.length - 5} more` : "");

function closedOnTrouble<T>(close: () => void, body: () => T): T {
  try {
    return body();
  } catch (error) {
    close();
    throw error;
  }
}
