/**
 * The weights of a checkpoint as tensors of Hugging Face, each assembled when it is written. The slices of a stacked parameter are read one
 * after the other, and the file tensors that hold it are kept until the next parameter begins.
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

/** A tensor to write. */
export interface ExportedTensor {
  readonly name: string;
  readonly shape: readonly number[];
  /** Stays f32 whatever the type of the others. */
  readonly isExact: boolean;
  /** The parameter that the tensor begins with: tensors of one parameter are best read one after the other. */
  readonly parameter?: string;
  read(): Float32Array;
}

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
}

/** Returns the tensors of a checkpoint in the order of its parameters, so that each parameter is read once. */
export function exportedTensors(model: Model, checkpoint: NamedWeights, experts: ExpertNames): ExportedTensor[] {
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
    return {
      ...{ name, shape: sizesOf(slice.shape), isExact: name.endsWith("e_score_correction_bias") },
      parameter: own[0]?.parameter.name ?? name,
      read: () => assembled(own, (parameter, ranges) => readerOf(parameter, parameters)(ranges), isTransposed),
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

/** Assembles a tensor from the blocks of its parameters, one block in memory at a time. */
function assembled(parts: readonly Part[], read: (parameter: string, ranges: Ranges) => Float32Array, isTransposed: boolean): Float32Array {
  const [{ slice }] = parts as [Part];
  const out = new Float32Array(product(slice.shape));
  for (const { parameter, slice } of parts)
    for (const { there, here, rows, cols } of slice.blocks) {
      const values = read(parameter.name, rangesOf(sizesOf(parameter.shape), here, rows * cols));
      if (rows === 1 || isTransposed) out.set(values, there);
      else transpose(values, cols, rows, out, there);
    }
  return out;
}

/** Returns the ranges of `count` elements from `start`: the whole tensor, or one index of its first dim. */
function rangesOf(sizes: readonly number[], start: number, count: number): Ranges {
  const [first = 1, ...rest] = sizes;
  const each = rest.reduce((n, size) => n * size, 1);
  const whole = rest.map((size) => [[0, size] as const]);
  if (start === 0 && count === first * each) return [[[0, first]], ...whole];
  if (count !== each || start % each !== 0) throw new Error(`rankc: elements ${start} to ${start + count} of ${sizes} are no slice`);
  return [[[start / each, start / each + 1]], ...whole];
}
