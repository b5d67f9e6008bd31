/**
 * The weights of a checkpoint as tensors of Hugging Face, read when they are written: a matrix that is transposed at a time, and a part of
 * anything else. The slices of a stacked parameter are read one after the other; file tensors that cannot be read in parts are kept until
 * the next parameter begins.
 */
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import type { Ranges } from "../shards.ts";
import { type HfParameter, parametersOf, product, sizesOf, type TensorSlice } from "./hfLayout.ts";
import { transpose } from "./transpose.ts";

type Model = Job["model"];

/**
 * The names of routed experts. `fused`: one tensor for all experts, as transformers 5 has them in memory. The others have tensors for each
 * expert, as files of models do.
 */
export type ExpertNames = "fused" | "mlp.experts" | "block_sparse_moe";

/** Consecutive elements of a tensor, from element `at`. */
export interface TensorPart {
  readonly at: number;
  readonly values: Float32Array;
}

/** A tensor to write. */
export interface ExportedTensor {
  readonly name: string;
  readonly shape: readonly number[];
  /** Stays f32 whatever the type of the others. */
  readonly isExact: boolean;
  /** The parameter that the tensor begins with: tensors of one parameter are best read one after the other. */
  readonly parameter?: string;
  /** About the most elements in memory while the tensor is read. Default: all. */
  readonly heldElements?: number;
  /** Reads the tensor part by part; a part is not used after the next is read. */
  parts(): Iterable<TensorPart>;
}

/** Elements of a part. */
const PART = 2 ** 21;

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
  /** Whether the functions of `slices` read rows of the first dim without the rest of the weight; absent: no. */
  readsRows?(name: string): boolean;
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
        ...own.map((part) =>
          isRead(part.parameter) ? Math.max(partElements, largestMatrix(part, isTransposed)) : product(part.parameter.shape),
        ),
      ),
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

/** The elements of the largest block that is transposed, and so read whole. */
function largestMatrix({ slice }: Part, isTransposed: boolean): number {
  const matrices = slice.blocks.filter(({ rows }) => rows > 1 && !isTransposed);
  return matrices.reduce((most, { rows, cols }) => Math.max(most, rows * cols), 0);
}

/**
 * Reads a block of a tensor part by part. `sizes`: of the parameter. A matrix is read whole, and each part is the transpose of some of its
 * columns; what lies in the parameter as in the tensor is read by rows of its first dim.
 */
function* partsOf(
  { there, here, rows, cols }: TensorSlice["blocks"][number],
  sizes: readonly number[],
  { read, isTransposed, readsRows, partElements }: BlockReader,
): Iterable<TensorPart> {
  const each = sizes.slice(1).reduce((n, size) => n * size, 1);
  const count = rows * cols;
  if (rows > 1 && !isTransposed) {
    const values = read(rangesOf(sizes, here, count));
    const most = Math.max(1, Math.floor(partElements / cols));
    const out = new Float32Array(Math.min(most, rows) * cols);
    for (let first = 0; first < rows; first += most) {
      const taken = Math.min(most, rows - first);
      transpose(values, [cols, rows], [first, first + taken], out);
      yield { at: there + first * cols, values: out.subarray(0, taken * cols) };
    }
  } else {
    const most = readsRows ? Math.max(1, Math.floor(partElements / each)) * each : count;
    for (let first = 0; first < count; first += most)
      yield { at: there + first, values: read(rangesOf(sizes, here + first, Math.min(most, count - first))) };
  }
}

/** Returns the ranges of `count` elements from `start`: rows of the first dim. */
function rangesOf(sizes: readonly number[], start: number, count: number): Ranges {
  const [, ...rest] = sizes;
  const each = rest.reduce((n, size) => n * size, 1);
  if (count % each !== 0 || start % each !== 0) throw new Error(`rankc: elements ${start} to ${start + count} of ${sizes} are no rows`);
  return [[[start / each, (start + count) / each]], ...rest.map((size) => [[0, size] as const])];
}
