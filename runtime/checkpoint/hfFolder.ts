/**
 * Writes a folder that `from_pretrained` of Hugging Face reads: safetensors files of limited size, their index, and text files. Threads
 * hold little more in memory than the largest tensor takes. The folder appears when it is complete.
 */
import {
  closeSync,
  copyFileSync,
  existsSync,
  fsyncSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join, resolve } from "node:path";
import { type Dtype, dtypes, encoded } from "../../schemas/dtypes.ts";
import { itemOf } from "../../schemas/lookup.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import type { ExportedTensor } from "./hfExport.ts";
import { headerOf } from "./safetensors.ts";

/** Element types of exported weights. */
export type ExportDtype = Extract<Dtype, "bf16" | "f16" | "f32">;

/** What a folder contains besides the tensors, and how they are written. */
export interface HfFolder {
  readonly dtype: ExportDtype;
  /** The most bytes of a file; a larger tensor has a file of its own. */
  readonly shardBytes: number;
  /** Text files by name. */
  readonly texts: Readonly<Record<string, string>>;
  /** Files to copy: their paths by name. */
  readonly copies: Readonly<Record<string, string>>;
  /** Called after each tensor. */
  readonly onTensor?: (writtenBytes: number) => void;
  /** Threads that write tensors; absent: this thread. */
  readonly writers?: ExportWriters;
}

/** The tensor of this number in the list of an export, to write at a byte of a file. */
export interface TensorTask {
  readonly tensor: number;
  readonly path: string;
  readonly at: number;
}

/** Threads that make the list of an export themselves, and write tensors of it. */
export interface ExportWriters {
  readonly count: number;
  /** `writer`: its number. Rejects with the error of the tensor or of the file system. */
  write(writer: number, task: TensorTask): Promise<void>;
  close(): Promise<void>;
}

const INDEX = "model.safetensors.index.json";
/** Older versions of transformers reject a file without the framework that saved it. */
const metadata = { format: "pt" };

interface Sized extends ExportedTensor {
  readonly dtype: ExportDtype;
  readonly bytes: number;
}

/** Returns the bytes that the tensors take in this type. */
export const bytesOfTensors = (tensors: readonly ExportedTensor[], dtype: ExportDtype): number =>
  tensors.reduce((sum, tensor) => sum + sized(tensor, dtype).bytes, 0);

function sized(tensor: ExportedTensor, dtype: ExportDtype): Sized {
  const own = tensor.isExact ? "f32" : dtype;
  return { ...tensor, dtype: own, bytes: elementsOf(tensor.shape) * dtypes[own].bytes };
}

/** Writes one safetensors file; it appears when it is complete. Throws a Trouble. */
export async function writeHfFile(
  path: string,
  tensors: readonly ExportedTensor[],
  how: Pick<HfFolder, "dtype" | "onTensor" | "writers">,
): Promise<void> {
  const part = `${path}.part`;
  try {
    await writeFiles([{ path: part, tensors: tensors.map((tensor) => sized(tensor, how.dtype)) }], tensors, how);
    renameSync(part, path);
  } catch (error) {
    rmSync(part, { force: true });
    throw unwritten(path, error);
  }
}

/** Throws a Trouble unless the folder is new, is empty, or holds a model that the new one replaces. */
export function expectReplaceable(folder: string): void {
  if (!existsSync(folder)) return;
  let names: string[];
  try {
    names = readdirSync(folder);
  } catch (error) {
    throw unwritten(folder, error);
  }
  if (names.length > 0 && !names.includes("config.json"))
    throw new Trouble(`${folder} is not empty, and holds no model`, "name another folder after -o");
}

/** Writes the folder. Throws a Trouble, and then leaves what was there as it was. */
export async function writeHfFolder(folder: string, tensors: readonly ExportedTensor[], how: HfFolder): Promise<void> {
  expectReplaceable(folder);
  const part = `${resolve(folder)}.part`;
  const old = `${resolve(folder)}.old`;
  try {
    rmSync(part, { recursive: true, force: true });
    makeFolder(part);
    const shards = shardsOf(
      tensors.map((tensor) => sized(tensor, how.dtype)),
      how.shardBytes,
    );
    const nameOf = (n: number): string =>
      shards.length === 1 ? "model.safetensors" : `model-${fiveDigits(n + 1)}-of-${fiveDigits(shards.length)}.safetensors`;
    await writeFiles(
      shards.map((shard, n) => ({ path: join(part, nameOf(n)), tensors: shard })),
      tensors,
      how,
    );
    if (shards.length > 1) {
      const weight_map = Object.fromEntries(shards.flatMap((shard, n) => shard.map(({ name }) => [name, nameOf(n)])));
      writeFileSync(
        join(part, INDEX),
        `${JSON.stringify({ metadata: { total_size: shards.reduce((sum, shard) => sum + bytesOf(shard), 0) }, weight_map }, null, 2)}\n`,
      );
    }
    for (const [name, text] of Object.entries(how.texts)) writeFileSync(join(part, name), text);
    for (const [name, from] of Object.entries(how.copies)) copyFileSync(from, join(part, name));
    rmSync(old, { recursive: true, force: true });
    if (existsSync(folder)) renameSync(folder, old);
    renameSync(part, folder);
    rmSync(old, { recursive: true, force: true });
  } catch (error) {
    rmSync(part, { recursive: true, force: true });
    if (!existsSync(folder) && existsSync(old)) renameSync(old, folder);
    throw unwritten(folder, error);
  }
}

const fiveDigits = (n: number): string => String(n).padStart(5, "0");
const bytesOf = (tensors: readonly Sized[]): number => tensors.reduce((sum, { bytes }) => sum + bytes, 0);

/** Distributes tensors over files of at most `limit` bytes, in their order. */
function shardsOf(tensors: readonly Sized[], limit: number): Sized[][] {
  const shards: Sized[][] = [[]];
  let used = 0;
  for (const tensor of tensors) {
    if (used > 0 && used + tensor.bytes > limit) {
      shards.push([]);
      used = 0;
    }
    shards.at(-1)?.push(tensor);
    used += tensor.bytes;
  }
  return shards;
}

/** A file to write, with its tensors in order. */
interface FileToWrite {
  readonly path: string;
  readonly tensors: readonly Sized[];
}
interface DueTensor extends TensorTask {
  readonly bytes: number;
  readonly parameter: string;
  readonly held: number;
}

/** Elements that tensors which are read at the same time may have in memory beside the largest of all. */
const BESIDE = 2 ** 26;

/** Writes files: first all headers, then the tensors of one parameter after those of another, each group in one of the writers. */
async function writeFiles(
  files: readonly FileToWrite[],
  all: readonly ExportedTensor[],
  how: Pick<HfFolder, "dtype" | "onTensor" | "writers">,
): Promise<void> {
  const { writers, dtype, onTensor } = how;
  const due = files.flatMap((file) => dueIn(file));
  const groups: DueTensor[][] = [];
  for (const [n, each] of due.entries()) {
    if (n === 0 || due[n - 1]?.parameter !== each.parameter) groups.push([]);
    groups.at(-1)?.push({ ...each, tensor: n });
  }
  let next = 0;
  let written = 0;
  const memory = new Shares(due.reduce((most, { held }) => Math.max(most, held), 0) + BESIDE);
  const work = async (writer: number): Promise<void> => {
    for (let group = groups[next++]; group; group = groups[next++]) {
      const held = Math.max(...group.map((tensor) => tensor.held));
      await memory.take(held);
      for (const { tensor, path, at, bytes } of group) {
        if (writers) await writers.write(writer, { tensor, path, at });
        else writeTensor({ tensor, path, at }, itemOf(all, tensor, "tensor"), dtype);
        written += bytes;
        onTensor?.(written);
        // signals and progress arrive here
        await new Promise(setImmediate);
      }
      memory.give(held);
    }
  };
  const ends = await Promise.allSettled(
    Array.from({ length: writers?.count ?? 1 }, async (_, writer) => {
      try {
        await work(writer);
      } catch (error) {
        next = groups.length;
        throw error;
      }
    }),
  );
  for (const end of ends) if (end.status === "rejected") throw end.reason;
  for (const { path } of files) withFile(path, "r+", fsyncSync);
}

/** Shares of something that several take at once. Who asks first gets first. */
class Shares {
  #free: number;
  readonly #waiting: { readonly share: number; readonly take: () => void }[] = [];

  constructor(all: number) {
    this.#free = all;
  }

  /** Resolves when the share, at most all there is, is free. */
  take(share: number): Promise<void> {
    return new Promise((take) => {
      this.#waiting.push({ share, take });
      this.give(0);
    });
  }

  give(share: number): void {
    this.#free += share;
    for (let [first] = this.#waiting; first && first.share <= this.#free; [first] = this.#waiting) {
      this.#waiting.shift();
      this.#free -= first.share;
      first.take();
    }
  }
}

/** Writes the header of a file. Returns its tensors with their places. */
function dueIn({ path, tensors }: FileToWrite): DueTensor[] {
  const entries = tensors.map(({ name, dtype, shape }) => ({ name, dtype: dtypes[dtype].safetensors, shape }));
  const header = headerOf(entries, metadata);
  withFile(path, "w", (fd) => writeAll(fd, header, 0));
  let at = header.length;
  return tensors.map(({ name, shape, parameter = name, heldElements = elementsOf(shape), bytes }) => {
    const own = { tensor: 0, path, at, bytes, parameter, held: heldElements };
    at += bytes;
    return own;
  });
}

/** Reads a tensor part by part, converts it, and writes it to its place. Throws a Trouble if it has values that the type cannot represent. */
export function writeTensor({ path, at }: TensorTask, tensor: ExportedTensor, dtype: ExportDtype): void {
  const { name, dtype: own, parts } = sized(tensor, dtype);
  withFile(path, "r+", (fd) => {
    for (const part of parts()) writeAll(fd, bytesFor(name, own, part.values), at + part.at * dtypes[own].bytes);
  });
}

function withFile(path: string, flags: string, act: (fd: number) => void): void {
  const fd = openSync(path, flags);
  try {
    act(fd);
  } finally {
    closeSync(fd);
  }
}

/** The largest finite value of f16. */
const F16_MAX = 65504;

function bytesFor(name: string, dtype: ExportDtype, values: Float32Array): Uint8Array {
  if (dtype === "f16" && values.some((value) => Math.abs(value) > F16_MAX))
    throw new Trouble(`${name} holds values that fp16 cannot represent`, "export with --dtype bf16 or fp32");
  const { words } = encoded(dtype, values);
  return new Uint8Array(words.buffer, words.byteOffset, words.byteLength);
}

function writeAll(fd: number, bytes: Uint8Array, at: number): void {
  for (let done = 0; done < bytes.length; ) done += writeSync(fd, bytes, done, Math.min(bytes.length - done, 2 ** 30), at + done);
}
