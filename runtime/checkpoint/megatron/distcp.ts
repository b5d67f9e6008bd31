/**
 * Opens a checkpoint of torch.distributed.checkpoint as Megatron Core writes it (`torch_dist`): .metadata says which chunk of which tensor
 * lies where in the .distcp files. Opening reads .metadata alone; a chunk is read when it is needed.
 */
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { dtypes, typedMemory, valuesIn } from "../../../schemas/dtypes.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { openInput } from "../../data/inputFile.ts";
import { copyShared, type Ranges, sharedBy } from "../../shards.ts";
import { PickledObject, type PickleValue, readPickle } from "./pickle.ts";
import { type ByteRange, readObject, readTensor, type StoredTensor, storageBytes } from "./torchFile.ts";

/** An open checkpoint. */
export interface Distcp {
  readonly folder: string;
  /** The shape of each tensor, by key. */
  readonly tensors: ReadonlyMap<string, readonly number[]>;
  /** Reads ranges of a tensor. Throws a Trouble if chunks are missing or damaged. */
  read(key: string, ranges: Ranges): Float32Array;
  /** Reads an object; undefined if the checkpoint has none of this key. */
  object(key: string): PickleValue | undefined;
  close(): void;
}

interface Place {
  readonly file: string;
  readonly offset: number;
  readonly bytes: number;
}
interface Chunk {
  readonly ranges: Ranges;
  readonly place: Place;
}
interface TensorChunks {
  readonly sizes: readonly number[];
  readonly chunks: readonly Chunk[];
}

const DAMAGED = "copy the checkpoint again, or name another one";

/** Returns the folder of one checkpoint: the folder itself, or the newest one in a folder that Megatron saved to. Throws a Trouble. */
export function distcpFolder(path: string): string {
  if (!statSync(path, { throwIfNoEntry: false })?.isDirectory())
    throw new Trouble(`${path} is no folder`, "name the folder of a checkpoint, such as iter_0001000");
  if (existsSync(join(path, ".metadata"))) return path;
  const latest = join(path, "latest_checkpointed_iteration.txt");
  if (existsSync(latest)) {
    const text = readFileSync(latest, "utf8").trim();
    if (!/^(\d{1,12}|release)$/.test(text))
      throw new Trouble(`${latest} holds ${JSON.stringify(text.slice(0, 40))}, which is no step`, DAMAGED);
    return distcpFolder(join(path, text === "release" ? text : `iter_${text.padStart(7, "0")}`));
  }
  const names = readdirSync(path);
  const old = names.some((name) => /^mp_rank_\d/.test(name));
  throw new Trouble(
    old
      ? `${path} has Megatron's format torch (mp_rank_…), not torch_dist`
      : `${path} has no .metadata: it is no checkpoint in the format torch_dist`,
    old
      ? "save it with --ckpt-format torch_dist: load it in Megatron with --ckpt-convert-format torch_dist"
      : "name the folder of a checkpoint, such as iter_0001000",
  );
}

/** Opens the checkpoint in `folder`. Throws a Trouble if .metadata is damaged, of another format, or unfinished. */
export function openDistcp(folder: string): Distcp {
  expectFormat(folder);
  const path = join(folder, ".metadata");
  const root = readPickle(readFileSync(path), path);
  const { tensors, objects } = entriesOf(root, path);
  const files = new Map<string, ReturnType<typeof openInput>>();
  const close = (): void => {
    for (const file of files.values()) file.close();
    files.clear();
  };
  const rangeOf = (key: string, { file: name, offset, bytes }: Place): ByteRange => {
    // stay below the limit of open files of a process
    if (!files.has(name) && files.size >= 64) close();
    const at = join(folder, name);
    const file = files.get(name) ?? openInput(at, "the file of a checkpoint", "copy all .distcp files of the checkpoint");
    files.set(name, file);
    if (offset + bytes > file.bytes)
      throw new Trouble(`${at}: ${key} should end at byte ${offset + bytes}, the file ends at ${file.bytes}: it was cut`, DAMAGED);
    return { where: `${at}: ${key}`, bytes, read: (into, from) => file.read(into, offset + from) };
  };
  return {
    folder,
    tensors: new Map([...tensors].map(([key, { sizes }]) => [key, sizes])),
    close,
    object(key) {
      const place = objects.get(key);
      return place && readObject(rangeOf(key, place));
    },
    read(key, ranges) {
      const tensor = tensors.get(key);
      if (!tensor) throw new Error(`rankc: ${folder} has no ${key}`);
      const out = new Float32Array(countOf(ranges));
      let found = 0;
      for (const chunk of tensor.chunks) {
        const shared = sharedBy(chunk.ranges, ranges);
        if (!shared) continue;
        copyShared(shared, [chunk.ranges, chunkValues(rangeOf(key, chunk.place), chunk)], [ranges, out]);
        found += shared.reduce((n, dim) => n * dim.reduce((sum, { length }) => sum + length, 0), 1);
      }
      if (found !== out.length) throw new Trouble(`${folder}: ${key} has chunks for ${found} of ${out.length} values`, DAMAGED);
      return out;
    },
  };
}

const countOf = (ranges: Ranges): number => ranges.reduce((n, dim) => n * dim.reduce((sum, [from, to]) => sum + to - from, 0), 1);

/** Throws a Trouble unless metadata.json, which Megatron writes last, says torch_dist. */
function expectFormat(folder: string): void {
  const path = join(folder, "metadata.json");
  let backend: unknown;
  try {
    backend = (JSON.parse(readFileSync(path, "utf8")) as { sharded_backend?: unknown }).sharded_backend;
  } catch (error) {
    const why = error instanceof SyntaxError ? "is not JSON" : "is missing";
    throw new Trouble(`${path} ${why}: Megatron writes it last, so the checkpoint is unfinished`, "name an earlier checkpoint");
  }
  if (backend !== "torch_dist")
    throw new Trouble(`${folder} has the format ${JSON.stringify(backend)?.slice(0, 60)}`, "save it with --ckpt-format torch_dist");
}

/** Reads the values of a chunk, contiguous and in f32. */
function chunkValues(range: ByteRange, { ranges }: Chunk): Float32Array {
  const stored = readTensor(range);
  const wanted = countOf(ranges);
  const count = stored.sizes.reduce((n, size) => n * size, 1);
  if (count !== wanted) throw new Trouble(`${range.where} has ${count} values, and .metadata says ${wanted}`, DAMAGED);
  return contiguous(valuesOf(range, stored), stored);
}

function valuesOf(range: ByteRange, { dtype, start, sizes, strides }: StoredTensor): Float32Array {
  // only the part of the storage that the view reaches
  const reach = sizes.some((n) => n === 0) ? 0 : 1 + sizes.reduce((sum, n, i) => sum + (n - 1) * (strides[i] ?? 0), 0);
  const buffer = new ArrayBuffer(reach * storageBytes[dtype]);
  range.read(new Uint8Array(buffer), start);
  if (dtype === "f64") return Float32Array.from(new Float64Array(buffer));
  const memory = typedMemory(dtype, buffer);
  return dtypes[dtype].kind === "float" ? (valuesIn(memory) as Float32Array) : new Float32Array();
}

function contiguous(values: Float32Array, { sizes, strides }: StoredTensor): Float32Array {
  let expected = 1;
  const isPlain = sizes
    .map((size, i) => ({ size, stride: strides[i] }))
    .reverse()
    .every(({ size, stride }) => {
      const plain = size === 1 || stride === expected;
      expected *= size;
      return plain;
    });
  if (isPlain) return values;
  const out = new Float32Array(sizes.reduce((n, size) => n * size, 1));
  let at = 0;
  const walk = (dim: number, from: number): void => {
    if (dim === sizes.length) out[at++] = values[from] ?? 0;
    else for (let i = 0; i < (sizes[dim] ?? 0); i++) walk(dim + 1, from + i * (strides[dim] ?? 0));
  };
  walk(0, 0);
  return out;
}

const TENSOR = "torch.distributed.checkpoint.metadata.TensorStorageMetadata";
const BYTES = "torch.distributed.checkpoint.metadata.BytesStorageMetadata";

function entriesOf(root: PickleValue, path: string): { tensors: Map<string, TensorChunks>; objects: Map<string, Place> } {
  const bad = (what: string): Trouble => new Trouble(`${path}: ${what}`, "name a checkpoint in the format torch_dist");
  const entries = field(root, "state_dict_metadata");
  const storage = field(root, "storage_data");
  if (!(entries instanceof Map) || !(storage instanceof Map))
    throw bad("has no list of tensors: it is not of torch.distributed.checkpoint");
  const places = new Map<string, { offsets: string; place: Place }[]>();
  for (const [index, info] of storage) {
    const [key, file, at, bytes] = [field(index, "fqn"), field(info, "relative_path"), field(info, "offset"), field(info, "length")];
    if (typeof key !== "string" || typeof file !== "string" || typeof at !== "number" || typeof bytes !== "number")
      throw bad("has an entry without its file, offset and length");
    if (!/^[^/\\]+\.distcp$/.test(file))
      throw bad(`names the file ${JSON.stringify(file.slice(0, 80))}, which is no .distcp file beside it`);
    if (field(info, "transform_descriptors")) throw new Trouble(`${path}: ${key} is compressed`, "save the checkpoint without compression");
    const own = places.get(key) ?? [];
    places.set(key, own);
    own.push({ offsets: `${sizesOf(field(index, "offset")) ?? ""}`, place: { file, offset: at, bytes } });
  }
  const tensors = new Map<string, TensorChunks>();
  const objects = new Map<string, Place>();
  for (const [key, value] of entries) {
    if (typeof key !== "string" || !(value instanceof PickledObject)) throw bad("has a key that is no text");
    const own = places.get(key) ?? [];
    if (value.type === BYTES && own[0]) objects.set(key, own[0].place);
    if (value.type !== TENSOR) continue;
    const sizes = sizesOf(field(value, "size"));
    const list = field(value, "chunks");
    if (!sizes || !Array.isArray(list)) throw bad(`describes ${key} without size or chunks`);
    const byOffsets = new Map(own.map(({ offsets, place }) => [offsets, place]));
    const chunks = list.map((chunk): Chunk => {
      const [offsets, lengths] = [sizesOf(field(chunk, "offsets")), sizesOf(field(chunk, "sizes"))];
      const place = offsets && byOffsets.get(`${offsets}`);
      if (!offsets || !lengths || !place) throw bad(`has no place for a chunk of ${key}`);
      return { ranges: offsets.map((from, i) => [[from, from + (lengths[i] ?? 0)] as const]), place };
    });
    tensors.set(key, { sizes, chunks });
  }
  return { tensors, objects };
}

const field = (value: PickleValue | undefined, name: string): PickleValue | undefined =>
  value instanceof PickledObject ? value.fields.get(name) : undefined;

/** Reads a torch.Size, which is a call with a tuple. */
function sizesOf(value: PickleValue | undefined): number[] | undefined {
  const list = value instanceof PickledObject && value.type === "torch.Size" ? value.args[0] : value;
  return Array.isArray(list) && list.every((n) => typeof n === "number" && Number.isSafeInteger(n) && n >= 0)
    ? (list as number[])
    : undefined;
}
