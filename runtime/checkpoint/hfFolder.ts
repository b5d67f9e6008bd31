/**
 * Writes a folder that `from_pretrained` of Hugging Face reads: safetensors files of limited size, their index, and text files. The memory
 * of all threads is limited by exportMemory.ts. The folder appears when it is complete.
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
import { type Dtype, dtypes } from "../../schemas/dtypes.ts";
import { itemOf } from "../../schemas/lookup.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../schemas/writing.ts";
import { BESIDE, EncodeBuffer, type MatrixMemory, placeColumns, Regions, Shares } from "./exportMemory.ts";
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
  /** Called at the end with the most bytes of regions and buffers in use at once (exportMemory.ts). */
  readonly onMemory?: (bytes: number) => void;
  /** Threads that write tensors; absent: this thread. */
  readonly writers?: ExportWriters;
}

/** The tensor of this number in the list of an export, to write at a byte of a file. */
export interface TensorTask {
  readonly tensor: number;
  readonly path: string;
  readonly at: number;
  /** Memory for its largest matrix that is read by columns. */
  readonly region: MatrixMemory;
}

/** Threads that make the list of an export themselves, and write tensors of it. */
export interface ExportWriters {
  readonly count: number;
  /** `writer`: its number. Returns the bytes of its buffers. Rejects with the error of the tensor or of the file system. */
  write(writer: number, task: TensorTask): Promise<number>;
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
  how: Pick<HfFolder, "dtype" | "onTensor" | "onMemory" | "writers">,
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
interface DueTensor extends Omit<TensorTask, "region"> {
  readonly bytes: number;
  readonly parameter: string;
  readonly held: number;
  /** Bytes of the largest matrix that is read by columns. */
  readonly matrix: number;
}

/** Elements of tensors that are read whole at the same time, beside the largest of all. */
const WHOLE = 2 ** 26;

/** Writes files: first all headers, then the tensors of one parameter after those of another, each group in one of the writers. */
async function writeFiles(
  files: readonly FileToWrite[],
  all: readonly ExportedTensor[],
  how: Pick<HfFolder, "dtype" | "onTensor" | "onMemory" | "writers">,
): Promise<void> {
  const { writers, dtype, onTensor } = how;
  const groups = groupsOf(files.flatMap((file) => dueIn(file)));
  let next = 0;
  let written = 0;
  const most = (value: (tensor: DueTensor) => number, of = groups.flat()): number => of.reduce((n, own) => Math.max(n, value(own)), 0);
  const whole = new Shares(most(({ held }) => held) + WHOLE);
  const regions = new Regions(most(({ matrix }) => matrix));
  const encode = new EncodeBuffer();
  const buffers: number[] = [];
  const work = async (writer: number): Promise<void> => {
    for (let group = groups[next++]; group; group = groups[next++]) {
      const held = most((tensor) => tensor.held, group);
      await whole.take(held);
      const region = await regions.take(most(({ matrix }) => matrix, group));
      for (const { tensor, path, at, bytes } of group) {
        const task = { tensor, path, at, region };
        if (writers) buffers[writer] = await writers.write(writer, task);
        else buffers[writer] = writeTensor(task, itemOf(all, tensor, "tensor"), dtype, encode);
        written += bytes;
        onTensor?.(written);
        // signals and progress arrive here
        await new Promise(setImmediate);
      }
      regions.give(region);
      whole.give(held);
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
  how.onMemory?.(buffers.reduce((sum, bytes) => sum + bytes, regions.peak));
}

/** Numbers tensors, and groups those that begin with the same parameter. Groups with the largest matrices begin first: others are written beside them. */
function groupsOf(due: readonly DueTensor[]): DueTensor[][] {
  const groups: DueTensor[][] = [];
  for (const [n, each] of due.entries()) {
    if (n === 0 || due[n - 1]?.parameter !== each.parameter) groups.push([]);
    groups.at(-1)?.push({ ...each, tensor: n });
  }
  const isLarge = (group: readonly DueTensor[]): boolean => group.some(({ matrix }) => matrix > BESIDE);
  return [...groups.filter(isLarge), ...groups.filter((group) => !isLarge(group))];
}

/** Writes the header of a file. Returns its tensors with their places. */
function dueIn({ path, tensors }: FileToWrite): DueTensor[] {
  const entries = tensors.map(({ name, dtype, shape }) => ({ name, dtype: dtypes[dtype].safetensors, shape }));
  const header = headerOf(entries, metadata);
  withFile(path, "w", (fd) => writeAll(fd, header, 0));
  let at = header.length;
  return tensors.map(({ name, dtype, shape, parameter = name, heldElements = elementsOf(shape), matrixElements = 0, bytes }) => {
    const matrix = matrixElements * dtypes[dtype].bytes;
    const own = { tensor: 0, path, at, bytes, parameter, held: heldElements, matrix };
    at += bytes;
    return own;
  });
}

/**
 * Reads a tensor part by part, converts it, and writes it to its place; a matrix that arrives by columns is written after its last one.
 * Returns the bytes of the buffers of this thread. Throws a Trouble if the tensor has values that the type cannot represent.
 */
export function writeTensor({ path, at, region }: TensorTask, tensor: ExportedTensor, dtype: ExportDtype, encode: EncodeBuffer): number {
  const { name, dtype: own, parts } = sized(tensor, dtype);
  const size = dtypes[own].bytes;
  withFile(path, "r+", (fd) => {
    for (const { at: element, values, columns } of parts()) {
      if (own === "f16") expectHalf(name, values);
      const bytes = encode.encode(own, values);
      const start = at + element * size;
      if (columns === undefined) writeAll(fd, bytes, start);
      else {
        placeColumns(bytes, columns, size, region);
        const { rows, cols, first } = columns;
        if (first + values.length / rows === cols) writeAll(fd, new Uint8Array(region.memory, region.at, rows * cols * size), start);
      }
    }
  });
  return encode.bytes + (tensor.bufferBytes?.() ?? 0);
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

function expectHalf(name: string, values: Float32Array): void {
  if (values.some((value) => Math.abs(value) > F16_MAX))
    throw new Trouble(`${name} holds values that fp16 cannot represent`, "export with --dtype bf16 or fp32");
}

function writeAll(fd: number, bytes: Uint8Array, at: number): void {
  for (let done = 0; done < bytes.length; ) done += writeSync(fd, bytes, done, Math.min(bytes.length - done, 2 ** 30), at + done);
}
