/**
 * The weights of a checkpoint as tensors of Hugging Face, read part by part when they are written: rows of a parameter, which are columns of
 * a tensor where the matrix is transposed. The slices of a stacked parameter are read one after the other; file tensors that cannot be read in parts are kept until
 * the next parameter begins.
 */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import type { Ranges } from "../shards.ts";
import type { Columns } from "./exportMemory.ts";
import { type HfParameter, parametersOf, product, sizesOf, type TensorSlice } from "./hfLayout.ts";

type Model = Job["model"];

/**
 * The names of routed experts. `fused`: one tensor for all experts, as transformers 5 has them in memory. The others have tensors for each
 * expert, as files of models do.
 */
export type ExpertNames = "fused" | "mlp.experts" | "block_sparse_moe";

/** Consecutive elements of a tensor, from element `at`, or columns of a matrix in it. */
export interface TensorPart {
  readonly at: number;
  readonly values: Float32Array;
  /**
   * Present: the values are these columns, one after another, of the matrix that begins at `at`. The parts of a matrix follow one another,
   * from its first column to its last.
   */
  readonly columns?: Columns;
}

/** A tensor to write. */
export interface ExportedTensor {
  readonly name: string;
  readonly shape: readonly number[];
  /** Stays f32 whatever the type of the others. */
  readonly isExact: boolean;
  /** The parameter that the tensor begins with: tensors of one parameter are best read one after the other. */
  readonly parameter?: string;
  /** The most elements of a part, but for ranges that have a digest. Default: all. */
  readonly heldElements?: number;
  /** Elements of the largest matrix that is read by columns. Default: 0. */
  readonly matrixElements?: number;
  /** Returns the bytes that the parts of all tensors use one after another. Absent: parts have memory of their own. */
  bufferBytes?(): number;
  /** Reads the tensor part by part; a part is not used after the next is read. */
  parts(): Iterable<TensorPart>;
}

/** Elements of a part. */
const PART = 2 ** 20;

interface Part {
  readonly parameter: HfParameter;
  readonly slice: TensorSlice;
}

/** Weights by rankc's names. */
export interface NamedWeights {
  has(name: string): boolean;
  /** Returns a function that reads ranges of a weight, in rankc's layout, in which a linear layer is [in, out]. */
  slices(name: string): (ranges: Ranges) => Float32Array;
  /** The functions of `slices` return linear layers as [out, in], the layout of Hugging Face, for the same ranges. */
  readonly isTransposed?: boolean;
  /** Whether the functions of `slices` read rows without the rest of the weight; absent: no. */
  readsRows?(name: string): boolean;
  /** Returns the bytes that the results of `slices` use one after another; absent: results have memory of their own. */
  reusedBytes?(): number;
}

/**
 * Returns the tensors of a checkpoint in the order of its parameters, so that each parameter is read once. `partElements`: about the most
 * elements of a part.
 */
export function exportedTensors(model: Model, checkpoint: NamedWeights, experts: ExpertNames, partElements = PART): ExportedTensor[] {
  const { isTransposed = false } = checkpoint;
  const parts = new Map<string, Part[]>();
  for (const parameter of parametersOf(model)) {
    if (parameter.optional && !checkpoint.has(parameter.name)) continue;
    for (const slice of layoutOf(parameter, experts)) parts.set(slice.tensor, [...(parts.get(slice.tensor) ?? []), { parameter, slice }]);
  }
  const open = new Map<string, (ranges: Ranges) => Float32Array>();
  const readerOf = (name: string, wanted: readonly string[]): ((ranges: Ranges) => Float32Array) => {
    for (const known of open.keys()) if (!wanted.includes(known)) open.delete(known);
    const reader = open.get(name) ?? checkpoint.slices(name);
    open.set(name, reader);
    return reader;
  };
  const tensors = [...parts].map(([name, own]): ExportedTensor => {
    const [{ slice }] = own as [Part];
    const parameters = own.map(({ parameter }) => parameter.name);
    const isRead = (parameter: HfParameter): boolean => checkpoint.readsRows?.(parameter.name) ?? false;
    return {
      ...{ name, shape: sizesOf(slice.shape), isExact: name.endsWith("e_score_correction_bias") },
      parameter: own[0]?.parameter.name ?? name,
      heldElements: Math.max(
        ...own.map(({ parameter }) =>
          isRead(parameter) ? Math.max(partElements, sizesOf(parameter.shape).at(-1) ?? 1) : product(parameter.shape),
        ),
      ),
      matrixElements: Math.max(...own.map((part) => largestMatrix(part, isTransposed))),
      bufferBytes: () => checkpoint.reusedBytes?.() ?? 0,
      *parts() {
        for (const { parameter, slice } of own)
          for (const block of slice.blocks) {
            const read = (ranges: Ranges) => readerOf(parameter.name, parameters)(ranges);
            yield* partsOf(block, sizesOf(parameter.shape), { read, isTransposed, readsRows: isRead(parameter), partElements });
          }
      },
    };
  });
  return [...tensors, ...repeated(model, tensors)];
}

/** Published checkpoints repeat the embedding and the head in layers of multi-token prediction. */
function repeated(model: Model, tensors: readonly ExportedTensor[]): ExportedTensor[] {
  const find = (name: string): ExportedTensor | undefined => tensors.find((tensor) => tensor.name === name);
  const embed = find("model.embed_tokens.weight");
  const head = find("lm_head.weight") ?? embed;
  return Array.from({ length: depthsOf(model) }, (_, k) => `model.layers.${model.layers + k}`).flatMap((at) => [
    ...(embed ? [{ ...embed, name: `${at}.embed_tokens.weight` }] : []),
    ...(head ? [{ ...head, name: `${at}.shared_head.head.weight` }] : []),
  ]);
}

const isFused = ([first]: readonly TensorSlice[]): boolean => /\.experts\.(gate_up_proj|down_proj)$/.test(first?.tensor ?? "");
const isSparseMoe = ([first]: readonly TensorSlice[]): boolean => first?.tensor.includes(".block_sparse_moe.") ?? false;

function layoutOf({ own, theirs }: HfParameter, experts: ExpertNames): readonly TensorSlice[] {
  if (experts === "fused") return theirs[0] ?? own;
  const each = theirs.filter((layout) => !isFused(layout));
  return each.find((layout) => isSparseMoe(layout) === (experts === "block_sparse_moe")) ?? each[0] ?? own;
}

/** How a block is read. */
interface BlockReader {
  readonly read: (ranges: Ranges) => Float32Array;
  readonly isTransposed: boolean;
  readonly readsRows: boolean;
  readonly partElements: number;
}

/** The elements of the largest block that is transposed. */
function largestMatrix({ slice }: Part, isTransposed: boolean): number {
  const matrices = slice.blocks.filter(({ rows }) => rows > 1 && !isTransposed);
  return matrices.reduce((most, { rows, cols }) => Math.max(most, rows * cols), 0);
}

/** Reads a block of a tensor part by part, by rows of the parameter. `sizes`: of the parameter. */
function* partsOf(
  { there, here, rows, cols }: TensorSlice["blocks"][number],
  sizes: readonly number[],
  { read, isTransposed, readsRows, partElements }: BlockReader,
): Iterable<TensorPart> {
  const count = rows * cols;
  if (rows > 1 && !isTransposed) {
    const most = readsRows ? Math.max(1, Math.floor(partElements / rows)) : cols;
    for (let first = 0; first < cols; first += most) {
      const values = read(rangesOf(sizes, here + first * rows, Math.min(most, cols - first) * rows));
      yield { at: there, values, columns: { rows, cols, first } };
    }
  } else {
    const each = sizes.slice(1).reduce((n, size) => n * size, 1);
    const most = readsRows ? Math.max(1, Math.floor(partElements / each)) * each : count;
    for (let first = 0; first < count; first += most)
      yield { at: there + first, values: read(rangesOf(sizes, here + first, Math.min(most, count - first))) };
  }
}

/** Returns the ranges of `count` elements from `start`: rows of the first dim, or rows within one index of it. */
function rangesOf(sizes: readonly number[], start: number, count: number): Ranges {
  const [, ...rest] = sizes;
  const each = rest.reduce((n, size) => n * size, 1);
  if (rest.length > 1 && count < each) {
    const index = Math.floor(start / each);
    return [[[index, index + 1]], ...rangesOf(rest, start - index * each, count)];
  }
  if (count % each !== 0 || start % each !== 0) throw new Error(`rankc: elements ${start} to ${start + count} of ${sizes} are no rows`);
  return [[[start / each, (start + count) / each]], ...rest.map((size) => [[0, size] as const])];
}
